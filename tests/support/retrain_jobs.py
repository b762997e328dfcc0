"""A small pipeline with real training, and a command that ends itself by SIGKILL at a point of it:

    python -m tests.support.retrain_jobs PIPELINE POINT

Points: `before STEP` and `after STEP` (done, not recorded), and `recorded STEP`.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.jobs import make_job

NAME, MODEL = "fresh", "small"


def make_pipeline(data: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """A pipeline over `data`/train; `changes` are dotted fields with '__' for the dots."""
    job = make_job(data, runs, train__epochs=1, export__h5=False)
    for field in ("validation", "test"):
        del job["data"][field]
    pipeline: dict[str, Any] = {
        "name": NAME,
        "job": job,
        "data": {"evaluation": {"fraction": 0.3, "key": ["row_id"]}},
        "gate": {
            "thresholds": [{"metric": "mae", "max": 1000}],
            "no_worse_than_champion": [{"metric": "mae", "by": 0.02}],
            "slices": [{"column": "k", "thresholds": [{"metric": "mae", "max": 1000}]}],
            "latency": {"one_row_ms": 5000, "thousand_rows_ms": 5000},
            "max_size_mb": 50,
        },
        "runs_dir": str(runs),
    }
    for name, value in changes.items():
        *sections, field = name.split("__")
        target = pipeline
        for section in sections:
            target = target.setdefault(section, {})
        target[field] = value
    return pipeline


def write_pipeline(folder: Path, pipeline: dict[str, Any]) -> Path:
    """The pipeline as a file."""
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    return path


def main(pipeline: str, point: str) -> None:
    """Run it, and die where the point says."""
    from lockstep import retrain as module
    from lockstep.retrain_steps import PipelineSteps
    from trainer.retrain import STEPS

    def die(label: str) -> None:
        if label == point:
            os.kill(os.getpid(), signal.SIGKILL)

    class Mortal(PipelineSteps):
        def __getattribute__(self, name: str) -> Any:
            method = super().__getattribute__(name)
            if name not in STEPS:
                return method

            def call(*arguments: Any) -> Any:
                die(f"before {name}")
                result = method(*arguments)
                die(f"after {name}")
                return result

            return call

    class Listener(module.SilentRetrainListener):
        def step(self, name: str, result: dict[str, Any]) -> None:
            die(f"recorded {name}")

    module.PipelineSteps = Mortal  # type: ignore[misc]
    print(json.dumps(module.retrain(pipeline, listener=Listener())))


if __name__ == "__main__":
    main(*sys.argv[1:])
