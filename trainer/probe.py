"""Builds a job's model once, in a process of its own, before anything is started.

`start_probe` runs `python -m trainer.probe` beside other preparations; its answer is the number of
parameters and the layers, or the error, with the user's own traceback where the user's code raised.
"""

import contextlib
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from configs.errors import UserCodeError
from configs.schema import Job
from data_pipeline.features import InputLayout
from trainer.errors import ModelError

IN_PROBE = "LOCKSTEP_IMPORTS_USER_CODE"
"""Set in processes that import the user's files, so that these cannot start a run of their own."""

_MARK = "lockstep-probe:"


@dataclass(frozen=True)
class ModelFacts:
    """What the probe found.

    Attributes:
        parameters: Trainable parameters.
        layers: Name, class and parameters of each layer.
        warnings: For the user.
    """

    parameters: int
    layers: list[tuple[str, str, int]]
    warnings: list[str]


class Probe:
    """A running probe."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def facts(self, timeout_s: float) -> ModelFacts:
        """Wait for the answer.

        Raises:
            ModelError: The model cannot be built or does not fit.
            UserCodeError: The user's builder raised.
        """
        try:
            output, errors = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ModelError(
                f"building the model took more than {timeout_s:g} s. Make the builder faster, or "
                "raise cluster.start_timeout_s."
            ) from None
        answer = _find_answer(output.decode(errors="replace"))
        if answer is None:
            tail = errors.decode(errors="replace")[-2000:]
            raise ModelError(
                f"building the model ended with status {self._process.returncode}:\n{tail}"
            )
        if answer["kind"] == "user_code":
            raise UserCodeError(answer["message"], answer["traceback"])
        if answer["kind"] == "model":
            raise ModelError(answer["message"])
        return ModelFacts(
            answer["parameters"], [tuple(layer) for layer in answer["layers"]], answer["warnings"]
        )

    def kill(self) -> None:
        """End the process; idempotent."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.communicate()


def start_probe(job: Job, layout: InputLayout) -> Probe:
    """Start building the job's model in another process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.probe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is the driver's
        env={
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1",
            IN_PROBE: "1",
        },
    )
    if process.stdin is not None:
        process.stdin.write(pickle.dumps((job, layout)))
        process.stdin.close()
        process.stdin = None
    return Probe(process)


def probe_model(job: Job, layout: InputLayout) -> ModelFacts:
    """Build the model here and try loss and metrics on two rows of zeros.

    Raises what `Probe.facts` raises.
    """
    import numpy as np
    import tensorflow as tf

    from data_pipeline.scan import Statistics
    from trainer import keras_adapter
    from trainer.causes import causes_of_difference
    from trainer.learner import has_row_weights
    from trainer.model import build_model, parameter_count

    statistics = None
    if any(feature.is_normalized for feature in layout.features):
        ones = np.ones(layout.channels, np.float32)
        statistics = Statistics(np.zeros_like(ones), ones)
    model = build_model(job, layout, statistics)
    inputs = tf.zeros((2, *layout.input_shape))
    labels = tf.zeros((2, layout.label_size), layout.label_dtype)
    weights = tf.ones(2) if has_row_weights(job) else None
    try:
        keras_adapter.build_training_state(model, inputs, labels, weights)
        outputs = model(inputs, training=False)
        keras_adapter.data_loss(model, labels, outputs, weights)
        keras_adapter.update_metrics(model, labels, outputs, weights, lambda _: True)
    except Exception as error:
        raise ModelError(
            f"output {tuple(model.output_shape[1:])} and label {layout.label!r} of "
            f"{layout.label_size} value(s) a row do not fit loss and metrics: {error}"
        ) from error
    if not isinstance(getattr(model, "output_shape", None), tuple):
        raise ModelError(
            f"{type(model).__name__} has no single known output shape; a Sequential or functional "
            "model with one output is allowed. Build it from layers."
        )
    if not model.trainable_variables:
        raise ModelError(
            "the model has no trainable parameter; training needs at least one. Set a layer's "
            "trainable to true."
        )
    layers = [(layer.name, type(layer).__name__, layer.count_params()) for layer in model.layers]
    unproved = keras_adapter.check_versions()
    devices = job.cluster.gpus_per_worker or job.cluster.cpu_devices_per_worker
    causes = causes_of_difference(model, job, job.cluster.workers * devices)
    warnings = [f"the result depends on the number of workers: {cause}" for cause in causes]
    return ModelFacts(
        parameter_count(model), layers, [*([unproved] if unproved else []), *warnings]
    )


def main() -> None:
    """Read a pickled (Job, InputLayout), print one line with the answer."""
    job, layout = pickle.load(sys.stdin.buffer)
    answer: dict[str, Any]
    try:
        facts = probe_model(job, layout)
    except UserCodeError as error:
        answer = {"kind": "user_code", "message": str(error), "traceback": error.traceback}
    except ModelError as error:
        answer = {"kind": "model", "message": str(error)}
    else:
        answer = {
            "kind": "facts",
            "parameters": facts.parameters,
            "layers": facts.layers,
            "warnings": facts.warnings,
        }
    print(_MARK + json.dumps(answer), flush=True)
    os._exit(0)


def _find_answer(output: str) -> dict[str, Any] | None:
    for line in output.splitlines():
        if line.startswith(_MARK):
            answer: dict[str, Any] = json.loads(line.removeprefix(_MARK))
            return answer
    return None


if __name__ == "__main__":
    main()
