"""Pipeline files: what loads, how overrides reach the job, and each kind of mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import JobError
from configs.load import load_pipeline
from configs.pipeline import Pipeline

CONFIGS = Path(__file__).parents[2] / "configs"

JOB: dict[str, Any] = {
    "name": "small",
    "model": {"layers": [{"Dense": {"units": 1}}]},
    "compile": {"loss": "mse", "metrics": ["mae"]},
    "data": {"train": "rows", "features": ["a", "b"], "label": "y"},
    "train": {"epochs": 1, "global_batch_size": 8},
}


def pipeline(**changes: Any) -> dict[str, Any]:
    """A pipeline's mapping; `changes` are dotted fields with '__' for the dots."""
    values: dict[str, Any] = {
        "name": "fresh",
        "job": JOB,
        "data": {"evaluation": {"fraction": 0.2}},
    }
    for name, value in changes.items():
        *sections, field = name.split("__")
        target = values
        for section in sections:
            target[section] = dict(target.get(section, {}))
            target = target[section]
        target[field] = value
    return values


def written(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def mistake(values: dict[str, Any]) -> str:
    with pytest.raises(JobError) as error:
        load_pipeline(values)
    return str(error.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*-retrain.yaml")), ids=lambda p: p.stem)
def test_every_pipeline_that_is_shipped_loads(path: Path) -> None:
    assert load_pipeline(path).name == path.stem


def test_the_job_stands_inside_or_in_a_file_of_its_own(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(JOB))
    inside = load_pipeline(written(tmp_path, pipeline()))
    outside = load_pipeline(written(tmp_path, pipeline(job=str(job))))
    assert inside == outside
    assert inside.model_name == "small"
    assert load_pipeline(pipeline(model="other")).model_name == "other"


@pytest.mark.parametrize("is_file", [False, True])
def test_an_override_reaches_into_the_job(tmp_path: Path, is_file: bool) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(JOB))
    path = written(tmp_path, pipeline(job=str(job) if is_file else JOB))
    loaded = load_pipeline(path, ["job.train.epochs=7", "data.evaluation.fraction=0.5"])
    assert loaded.job.train.epochs == 7
    assert loaded.data.evaluation.fraction == 0.5


def test_another_job_file_can_be_set(tmp_path: Path) -> None:
    job = tmp_path / "other.yaml"
    job.write_text(yaml.safe_dump(JOB | {"name": "other"}))
    loaded = load_pipeline(pipeline(), [f"job={job}", "job.train.epochs=3"])
    assert (loaded.job.name, loaded.job.train.epochs) == ("other", 3)


def test_a_pipeline_loads_from_what_it_was_dumped_to() -> None:
    loaded = load_pipeline(pipeline(gate__thresholds=[{"metric": "mae", "max": 3}]))
    assert load_pipeline(loaded) == loaded
    assert load_pipeline(loaded.model_dump(mode="json")) == loaded


def test_mistakes_name_file_and_line_inside_the_job_too(tmp_path: Path) -> None:
    values = pipeline(job__train={"epocs": 1, "epochs": 1, "global_batch_size": 8})
    path = written(tmp_path, values)
    with pytest.raises(JobError) as error:
        load_pipeline(path)
    text = str(error.value)
    line = next(n for n, line in enumerate(path.read_text().splitlines(), 1) if "epocs" in line)
    assert text.startswith(f"{path}:{line}: unknown key job.train.epocs; allowed here: epochs,")
    assert text.endswith("Did you mean 'epochs'?")


def test_a_missing_file_is_called_a_pipeline_file(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"no pipeline file at .*nightly\.yaml"):
        load_pipeline(tmp_path / "nightly.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(JobError, match="name, job and data is allowed.*schema --pipeline"):
        load_pipeline(tmp_path / "empty.yaml")


MISTAKES = {
    "no rows that judge": ({"data__evaluation": {}}, "exactly one of files, newest_files"),
    "two kinds of them": (
        {"data__evaluation": {"fraction": 0.1, "newest_files": 1}},
        "received newest_files and fraction",
    ),
    "a key of nothing": (
        {"data__evaluation": {"newest_files": 1, "key": ["id"]}},
        "key has no effect without fraction",
    ),
    "days without a column": ({"data__window_days": 3.0}, "time_column names none"),
    "files with a column": (
        {"data__time_column": "t", "data__window_files": 3},
        "Use window_days, or remove time_column",
    ),
    "a hash with a column": (
        {"data__time_column": "t", "data__identity": "hash"},
        "identity: hash has no effect",
    ),
    "a window of new rows": (
        {"data__train_on": "new", "data__window_files": 3, "start_from": "champion"},
        "a window has no effect with train_on: new",
    ),
    "the newest rows judge and train": (
        {"data__train_on": "new", "data__evaluation": {"newest_files": 1}},
        "trains on the rows that evaluation takes away",
    ),
    "forgetting": ({"data__train_on": "new"}, "forgets all old rows"),
    "a threshold without bound": (
        {"gate__thresholds": [{"metric": "mae"}]},
        "gate.thresholds.0: mae has no bound. Set min or max.",
    ),
    "a threshold that nothing passes": (
        {"gate__thresholds": [{"metric": "mae", "min": 2, "max": 1}]},
        "nothing passes",
    ),
    "a slice that checks nothing": (
        {"gate__slices": [{"column": "origin"}]},
        "slices of 'origin' check nothing",
    ),
    "a latency without bound": ({"gate__latency": {}}, "latency has no bound"),
    "two addresses": (
        {"on_success": {"url": "http://a/b", "url_from": "HOOK"}},
        "exactly one of url and url_from",
    ),
    "an address with a password": (
        {"on_failure": {"url": "https://me:pass@host/hook"}},
        "secrets come from the environment",
    ),
    "an address of a file": ({"on_success": {"url": "file:///etc/passwd"}}, "http:// or https://"),
    "images": (
        {"job__data": JOB["data"] | {"images": {"height": 8, "width": 8}}},
        "a pipeline takes files with rows",
    ),
}


@pytest.mark.parametrize(("changes", "text"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told(changes: dict[str, Any], text: str) -> None:
    assert text in mistake(pipeline(**changes))


def test_a_secret_in_an_address_is_not_repeated() -> None:
    assert "pass" not in mistake(pipeline(on_failure={"url": "https://me:pass@host/hook"})).replace(
        "password", ""
    )


def test_the_schema_offers_a_path_for_the_job() -> None:
    job = Pipeline.model_json_schema()["properties"]["job"]
    assert {"type": "string"} in job["anyOf"]


def test_metrics_of_the_gate_are_named_once() -> None:
    loaded = load_pipeline(
        pipeline(
            gate__thresholds=[{"metric": "mae", "max": 3}],
            gate__slices=[
                {"column": "a", "no_worse_than_champion": [{"by": 0.1}, {"metric": "mae", "by": 0}]}
            ],
        )
    )
    assert loaded.gate.metrics == ["mae", "loss"]
