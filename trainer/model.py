"""From a job to a compiled Keras model; the same model on every worker and in every process.

Owns the reading of Keras objects as they stand in job files, the three sources of a model, and the
seed.
"""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np

from configs.catalog import catalog, find_kind, is_own_code, split_spec
from configs.schema import CompileConfig, Job
from configs.section import KerasSpec
from data_pipeline.features import InputLayout
from data_pipeline.scan import Statistics
from trainer import keras_adapter
from trainer.errors import ModelError, user_code_error
from trainer.front import columns_of, front_layers, has_front
from trainer.legacy.file import is_old_h5

_MODULES = {
    "layers": keras.layers,
    "losses": keras.losses,
    "metrics": keras.metrics,
    "optimizers": keras.optimizers,
    "schedules": keras.optimizers.schedules,
    "callbacks": keras.callbacks,
    "initializers": keras.initializers,
    "regularizers": keras.regularizers,
    "constraints": keras.constraints,
}


def build_model(job: Job, layout: InputLayout, statistics: Statistics | None) -> keras.Model:
    """The job's model, compiled, weights initialised from the seed.

    Call inside a strategy's scope to place its variables there.

    Raises:
        ModelError: Keras refuses the description, or the model does not fit the input.
        UserCodeError: The user's builder raised.
    """
    keras.utils.set_random_seed(job.train.seed)
    if job.model.builder is None:
        keras.config.set_dtype_policy(job.train.dtype_policy)
    if job.model.layers is not None:
        model = _model_from_layers(job, layout, statistics)
    elif job.model.builder is not None:
        built = call_builder(job.model.builder, job.model.arguments, job.train.dtype_policy)
        model = _with_front(with_one_input(built, layout), job, layout, statistics)
    else:
        loaded = with_one_input(load_keras_file(str(job.model.file)), layout)
        model = _with_front(loaded, job, layout, statistics)
    _check_input(model, layout)
    if job.compile is not None:
        compile_model(model, job.compile)
    elif getattr(model, "optimizer", None) is None:
        raise ModelError(
            "the model is not compiled and the job has no compile section. Add compile to the job, "
            "or compile the model in the builder."
        )
    return model


def make(kind: str, spec: KerasSpec) -> Any:
    """The Keras object that a name or a `{Class: {argument: value}}` mapping stands for.

    Raises:
        ModelError: Keras refuses the arguments.
        UserCodeError: The user's own class raised.
    """
    name, arguments = split_spec(spec)
    if is_own_code(name):
        found = import_object(name)
        if kind in ("losses", "metrics") and inspect.isfunction(found) and not arguments:
            return found  # of (y_true, y_pred), as Keras takes it
        try:
            return found(**arguments)
        except Exception as error:
            raise user_code_error(name, error) from error
    if name not in catalog()[kind]["classes"]:
        return _without_alias(kind, name)
    try:
        return getattr(_MODULES[kind], name)(**{k: _nested(v) for k, v in arguments.items()})
    except Exception as error:
        raise ModelError(f"keras.{kind}.{name} refuses {arguments}: {error}") from error


def _without_alias(kind: str, name: str) -> Any:
    """The object behind an alias such as "mse": Keras writes aliases to .h5 and cannot read them.

    Metrics keep the alias as their name, so the keys of logs stay what the user wrote.
    """
    if kind not in ("losses", "metrics") or name in ("accuracy", "acc", "crossentropy", "ce"):
        return name
    function = _MODULES[kind].get(name)
    wanted = getattr(function, "__name__", "").replace("_", "")
    for class_name in catalog()[kind]["classes"]:
        if class_name.lower() == wanted:
            named = {"name": name} if kind == "metrics" else {}
            return getattr(_MODULES[kind], class_name)(**named)
    return name


def compile_model(model: keras.Model, config: CompileConfig) -> None:
    """Compile as the job says."""
    model.compile(
        optimizer=make("optimizers", config.optimizer),
        loss=make("losses", config.loss),
        metrics=[make("metrics", metric) for metric in config.metrics],
        weighted_metrics=[make("metrics", metric) for metric in config.weighted_metrics] or None,
        loss_weights=config.loss_weights,
    )


def import_object(name: str) -> Any:
    """The object at 'package.module:attribute' or 'path/to/file.py:attribute'."""
    place, _, attribute = name.partition(":")
    if place.endswith(".py"):
        path = Path(place).resolve()
        name = f"lockstep_user_{path.stem}"  # never the name of one of our own packages
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.exists():
            raise ModelError(f"no Python file at {place}. Name the file that holds {attribute}.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        spec.loader.exec_module(module)
    else:
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        module = importlib.import_module(place)
    if not hasattr(module, attribute):
        names = [key for key in vars(module) if not key.startswith("_")]
        raise ModelError(f"{place} has no {attribute!r}; it has {', '.join(names)}.")
    return getattr(module, attribute)


def call_builder(builder: str, arguments: dict[str, Any], dtype_policy: str) -> keras.Model:
    """The model that the user's function returns.

    Raises:
        UserCodeError: It raised, with the user's own traceback.
        ModelError: It returned something else.
    """
    keras.config.set_dtype_policy(dtype_policy)
    try:
        function = import_object(builder)
        model = function(**arguments)
    except ModelError:
        raise
    except Exception as error:
        raise user_code_error(f"the builder {builder}", error) from error
    if not isinstance(model, keras.Model):
        raise ModelError(
            f"the builder {builder} returned {type(model).__name__}; a Keras model is allowed. "
            "Return the model."
        )
    return model


def load_keras_file(path: str) -> keras.Model:
    """The model in a .keras or .h5 file, with its optimizer where it has one.

    Raises:
        ModelError: It cannot be loaded, or is one of Keras 1 or 2.
    """
    if (
        Path(path).suffix.lower() in (".h5", ".hdf5")
        and Path(path).is_file()
        and is_old_h5(Path(path))
    ):
        raise ModelError(
            f"{path} was written by Keras 1 or 2; files of Keras 3 are loaded as they are. Convert "
            "it with `lockstep models import FILE --name NAME`, and name the model.keras of its "
            "artifact."
        )
    try:
        return keras.saving.load_model(path)
    except Exception as error:
        raise ModelError(
            f"cannot load {path}: {error}. A .keras or .h5 model is allowed."
        ) from error


def parameter_count(model: keras.Model) -> int:
    """Trainable parameters."""
    return int(sum(np.prod(variable.shape) for variable in model.trainable_variables))


def _model_from_layers(
    job: Job, layout: InputLayout, statistics: Statistics | None
) -> keras.Sequential:
    layers = [keras.layers.Input(layout.input_shape, name="input")]
    layers += [make("layers", spec) for spec in job.data.augment]
    layers += front_layers(layout, statistics)
    for index, spec in enumerate(job.model.layers or []):
        name = split_spec(spec)[0]
        if name in ("Input", "InputLayer"):
            raise ModelError(
                f"model.layers.{index} is {name}; the input comes from data.features, with shape "
                f"{layout.input_shape}. Remove this layer."
            )
        layers.append(make("layers", spec))
    try:
        return keras.Sequential(layers, name=job.name.replace(".", "_").replace("-", "_"))
    except Exception as error:
        raise ModelError(
            f"the layers do not fit together for an input of shape {layout.input_shape}: {error}"
        ) from error


def _with_front(
    model: keras.Model, job: Job, layout: InputLayout, statistics: Statistics | None
) -> keras.Model:
    """Put augmentation and front before the first layer; what the model has already stays."""
    present = {type(layer) for layer in model.layers}
    augment = [make("layers", spec) for spec in job.data.augment]
    front = [layer for layer in augment if type(layer) not in present]
    if not has_front(model):
        front += front_layers(layout, statistics)
    if not front:
        return model
    if not isinstance(model, keras.Sequential):
        raise ModelError(
            "data.normalize, data.augment and encodings other than index put layers before the "
            f"model's own, which must be a Sequential model; received {type(model).__name__}. Put "
            "these layers into the model, and set normalize: false and encoding: index."
        )
    layers = [keras.layers.Input(layout.input_shape), *front, *model.layers]
    wrapped = keras.Sequential(layers, name=model.name)
    if getattr(model, "optimizer", None) is not None:
        keras_adapter.compile_like(wrapped, model)
    return wrapped


def _refuse_own_steps(model: keras.Model) -> None:
    replaced = keras_adapter.own_steps(model)
    if replaced:
        raise ModelError(
            f"{type(model).__name__} brings a {' and a '.join(replaced)} of its own; Lockstep runs "
            "Keras's step on all workers together and would not call it. Express it as a loss, a "
            "metric or a layer."
        )


def with_one_input(model: keras.Model, layout: InputLayout) -> keras.Model:
    """A model of several inputs, named as features are, behind one input of joined rows."""
    _refuse_own_steps(model)
    names = [tensor.name for tensor in getattr(model, "inputs", None) or []]
    if len(names) < 2:
        return model
    known = {feature.name: feature for feature in layout.features}
    unknown = [name for name in names if name not in known]
    if unknown or len(names) != len(known):
        raise ModelError(
            f"the model has inputs {', '.join(names)}; data.features has {', '.join(known)}. "
            "Name each input of the model as a feature, and each feature as an input."
        )
    joined = keras.layers.Input((layout.width,), name="input")
    parts = {}
    for tensor in model.inputs:
        feature = known[tensor.name]
        part = columns_of(joined, feature.offset, feature.offset + feature.size)
        # In full precision: an id of a token is a number, too.
        parts[tensor.name] = keras.layers.Reshape(tensor.shape[1:], dtype="float32")(part)
    inner = keras.Model(model.inputs, model.outputs[0])  # without an optimizer of its own
    outputs = inner([parts[name] for name in names])
    wrapped = keras.Model(joined, outputs, name=model.name)
    if getattr(model, "optimizer", None) is not None:
        keras_adapter.compile_like(wrapped, model)
    return wrapped


def _check_input(model: keras.Model, layout: InputLayout) -> None:
    if not model.built:
        try:
            if isinstance(model, keras.Sequential):
                model.build((None, *layout.input_shape))
            else:
                model(keras.KerasTensor((None, *layout.input_shape)))
        except Exception as error:
            raise ModelError(
                f"the model cannot be built for an input of shape {layout.input_shape}, which the "
                f"features give: {error}"
            ) from error
    shape = getattr(model, "input_shape", None)
    if shape is None or not isinstance(shape, tuple) or any(isinstance(s, tuple) for s in shape):
        return
    fits = len(shape) == 1 + len(layout.input_shape) and all(
        axis is None or axis == given
        for axis, given in zip(shape[1:], layout.input_shape, strict=True)
    )
    if not fits:
        raise ModelError(
            f"the model's input has shape {tuple(shape[1:])}; data.features gives "
            f"{layout.input_shape}. Change the model's input or the features."
        )


def _names_code(text: str) -> bool:
    """Whether an argument names a function or class of the user's: 'file.py:name'."""
    place, _, attribute = text.partition(":")
    return attribute.isidentifier() and (
        place.endswith(".py") or all(part.isidentifier() for part in place.split("."))
    )


def _nested(value: Any) -> Any:
    """Keras objects inside arguments, recognised by their class name."""
    if isinstance(value, list):
        return [_nested(element) for element in value]
    if isinstance(value, str) and _names_code(value):
        return import_object(value)
    if isinstance(value, dict) and len(value) == 1:
        name = str(next(iter(value)))
        kind = find_kind(name)
        if kind is not None:
            return make(kind, value)
    return value
