"""What trained an old model: loss, metrics and optimizer, by Keras 3's own classes.

Owns the old names and arguments. What was the author's own is left out and noted: the model
predicts without it, and a job can name another.
"""

from collections.abc import Callable
from typing import Any

import keras

from configs.catalog import catalog
from configs.errors import LockstepError
from trainer.legacy.file import Config, OldModel
from trainer.model import make

Note = Callable[[str], None]

_OPTIMIZERS = {
    name.lower(): name
    for name in (
        "SGD",
        "RMSprop",
        "Adagrad",
        "Adadelta",
        "Adam",
        "Adamax",
        "Nadam",
        "Ftrl",
        "AdamW",
    )
}


def compile_as_before(model: keras.Model, old: OldModel, note: Note) -> None:
    """Compile a rebuilt model as the old one was; without loss or optimizer it stays as it is.

    The state of the optimizer is not taken over: its arrays belong to the old layers.
    """
    training = old.training
    if not training:
        note("the file tells no loss; a job that trains the model needs a compile section")
        return
    loss = _loss(training.get("loss"), note)
    if loss is None:
        return
    metrics = _metrics(training, note)
    optimizer = _optimizer(training.get("optimizer_config") or {}, note)
    weights = training.get("loss_weights")
    if weights:
        note(f"loss_weights {weights} are left out; they are for models of several outputs")
    model.compile(optimizer=optimizer, loss=loss, metrics=metrics or None)
    if old.has_optimizer_state:
        note("the optimizer begins anew; its state of before is left out")


def _loss(described: Any, note: Note) -> Any:
    if isinstance(described, list) and len(described) == 1:
        described = described[0]
    if isinstance(described, dict) and "class_name" not in described and len(described) == 1:
        described = next(iter(described.values()))  # by the name of the only output
    found = _made("losses", described, note)
    if found is None:
        note(
            f"the loss {str(described)[:80]!r} is not one of Keras's and is left out; a job that "
            "trains the model needs a compile section"
        )
    return found


def _metrics(training: Config, note: Note) -> list[Any]:
    described = training.get("metrics") or []
    if isinstance(described, dict):
        described = next(iter(described.values())) if len(described) == 1 else []
    if not isinstance(described, list):
        described = [described]
    flat = [item for one in described for item in (one if isinstance(one, list) else [one])]
    made = []
    for item in flat:
        metric = _made("metrics", item, note)
        if metric is None:
            note(f"the metric {str(item)[:80]!r} is not one of Keras's and is left out")
        else:
            made.append(metric)
    return made


def _made(kind: str, described: Any, note: Note) -> Any:
    """A loss or metric by its name or old configuration; None where it is not Keras's."""
    table = catalog()[kind]
    name, arguments = described, {}
    if isinstance(described, dict):
        name = described.get("class_name")
        config = described.get("config") or {}
        if name in ("LossFunctionWrapper", "MeanMetricWrapper"):
            name = str(config.get("fn", config.get("name")))
        elif isinstance(config, dict):
            arguments = config
    if not isinstance(name, str):
        return None
    try:
        if name in table["classes"]:
            allowed = table["classes"][name]["arguments"]
            kept = {
                key: value
                for key, value in arguments.items()
                if key in allowed and key not in ("reduction", "fn", "dtype") and value is not None
            }
            return make(kind, {name: kept} if kept else name)
        return make(kind, name) if name in table["aliases"] else None
    except LockstepError:
        return None


def _optimizer(described: Any, note: Note) -> Any:
    if isinstance(described, str):
        described = {"class_name": described}
    class_name = str(described.get("class_name", "")).rpartition(">")[2]  # of `Custom>Adam`
    config = described.get("config") or {}
    known = _OPTIMIZERS.get(class_name.lower())
    if known is None:
        note(
            f"the optimizer {class_name or 'of the file'!r} is not one of Keras 3's; rmsprop is set"
        )
        return keras.optimizers.RMSprop()
    allowed = catalog()["optimizers"]["classes"][known]["arguments"]
    arguments = {
        key: value
        for key, value in config.items()
        if key in allowed and key not in ("name", "learning_rate", "jit_compile")
        if isinstance(value, int | float | bool)
    }
    if known == "Adam" and not arguments.get("epsilon", 1):
        arguments.pop("epsilon")
    rate = config.get("learning_rate", config.get("lr", 0.001))
    if not isinstance(rate, int | float):
        note(f"the learning rate's schedule {str(rate)[:60]!r} is left out; 0.001 is set")
        rate = 0.001
    decay = config.get("decay") or 0.0
    schedule: Any = float(rate)
    if decay:  # Keras 1 and 2: rate / (1 + decay * step)
        schedule = keras.optimizers.schedules.InverseTimeDecay(float(rate), 1, float(decay))
    try:
        return getattr(keras.optimizers, known)(learning_rate=schedule, **arguments)
    except (TypeError, ValueError) as error:
        note(f"{known} refuses its old arguments ({error}); its usual ones are set")
        return getattr(keras.optimizers, known)(learning_rate=schedule)
