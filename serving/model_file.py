"""Model files of every format, loaded as one function from rows to predictions.

Owns the three formats (`.keras`, `.h5`, SavedModel), the search for the signature, and what is
refused. Nobody else needs to know which format a model came in.

A model file is a program of somebody's. Keras files are loaded in Keras's safe mode, which refuses
Lambda layers and unknown classes; a SavedModel may hold any TensorFlow operation, and these can
read and write files. Load models of strangers in a process that may be lost.
"""

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import keras
import tensorflow as tf

from configs.errors import did_you_mean
from data_pipeline.encoding import ENCODED_ENDPOINT
from data_pipeline.features import InputLayout
from data_pipeline.naming import unlabelled_layout
from serving.errors import ModelFileError
from serving.signature import (
    SIGNATURE_FILE,
    Signature,
    name_columns,
    read_signature,
)

_H5_SUFFIXES = (".h5", ".hdf5")
_FORMATS = "an artifact folder, a .keras or .h5 file, or a SavedModel folder is allowed"
_IN_FOLDER = ("model.keras", "saved_model", "trained_model.h5")
_COMPILE_NAMES = ("loss", "loss_weights", "metrics", "weighted_metrics")

# All that loaders were seen to raise on damaged and foreign files.
_LOAD_ERRORS = (
    *(ArithmeticError, AttributeError, EOFError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError, zipfile.BadZipFile, tf.errors.OpError),
)


@dataclass(frozen=True)
class LoadedModel:
    """A model of any format.

    Attributes:
        path: The file or folder it was loaded from.
        signature: What it takes and gives.
        call: From `(rows, *input_shape) float32` to `(rows, *output_shape) float32`, in a graph or
            eagerly.
    """

    path: Path
    signature: Signature
    call: Callable[[tf.Tensor], tf.Tensor]


def load_model(path: str | Path, features: Sequence[str] = ()) -> LoadedModel:
    """Load a model with its signature.

    Args:
        path: An artifact folder, a `.keras` or `.h5` file, or a SavedModel folder. The signature is
            looked for beside it.
        features: The input columns in order, for a model without signature.

    Raises:
        ModelFileError: There is no model, it cannot be loaded, it is not one of one input and one
            output, or nothing tells its columns.
    """
    model_path = _find_model(Path(path))
    beside = model_path.parent / SIGNATURE_FILE
    signature = read_signature(beside) if beside.exists() else None
    if signature is not None and features:
        raise ModelFileError(
            f"--features has no effect: {beside} tells the columns of {model_path}. Remove it."
        )
    if model_path.is_dir():
        return _load_saved_model(model_path, signature, features)
    return _load_keras(model_path, signature, features)


def _find_model(path: Path) -> Path:
    if not path.exists():
        siblings = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ModelFileError(
            f"no model at {path}; {_FORMATS}.{did_you_mean(path.name, siblings)} Check the path."
        )
    if path.is_file():
        if path.suffix.lower() in (".keras", *_H5_SUFFIXES):
            return path
        raise ModelFileError(f"{path} is not a model file; {_FORMATS}. Name the model.")
    if (path / "saved_model.pb").exists():
        return path
    for name in _IN_FOLDER:
        if (path / name).exists():
            return path / name
    inner = path / "artifact"
    remedy = f"Give {inner}." if inner.is_dir() else "Name the folder that holds the model."
    held = ", ".join(sorted(other.name for other in path.iterdir())[:8]) or "nothing"
    raise ModelFileError(f"{path} holds {held}; {_FORMATS}. {remedy}")


def _load_keras(path: Path, signature: Signature | None, features: Sequence[str]) -> LoadedModel:
    if path.suffix.lower() in _H5_SUFFIXES:
        _refuse_old_h5(path)
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except _LOAD_ERRORS as error:
        raise _not_loaded(path, error) from error
    input_shape = _only_shape(path, "input", getattr(model, "input_shape", None))
    if signature is None:
        output_shape = _only_shape(path, "output", model.output_shape)
        layout = name_columns(features, _known_shape(path, "input", input_shape), str(path))
        signature = Signature(layout, _known_shape(path, "output", output_shape), None)
    _check_fit(path, input_shape, signature.layout)
    if signature.compile is None:
        signature = replace(signature, compile=_compile_record(path, model))
    shape = [-1, *signature.layout.input_shape] if input_shape else [-1]

    def call(rows: tf.Tensor) -> tf.Tensor:
        return tf.cast(model(tf.reshape(rows, shape), training=False), tf.float32)

    return LoadedModel(path, signature, call)


def _load_saved_model(
    path: Path, signature: Signature | None, features: Sequence[str]
) -> LoadedModel:
    try:
        loaded = tf.saved_model.load(str(path))
    except _LOAD_ERRORS as error:
        raise _not_loaded(path, error) from error
    is_encoded = signature is not None and bool(signature.layout.encodings)
    endpoint = ENCODED_ENDPOINT if is_encoded else "serving_default"
    specs, output_name, output_spec = _endpoint(path, loaded, endpoint)
    if signature is None:
        output = _only_shape(path, "output", output_spec.shape)
        layout = _layout_of_inputs(path, specs, features)
        signature = Signature(layout, _known_shape(path, "output", output), None)
    layout = signature.layout
    if len(specs) == 1:
        ((name, spec),) = specs.items()
        _check_fit(path, _only_shape(path, "input", spec.shape), layout)
        inputs = [(name, spec.dtype, [-1, *layout.input_shape] if spec.shape.rank > 1 else [-1])]
        sizes = [layout.width]
    else:
        _check_names(path, set(specs), layout)
        inputs = [(c.name, specs[c.name].dtype, [-1, *c.shape]) for c in layout.features]
        sizes = [column.size for column in layout.features]

    def call(rows: tf.Tensor) -> tf.Tensor:
        parts = tf.split(tf.reshape(rows, [-1, layout.width]), sizes, axis=1)
        columns = {
            name: tf.cast(tf.reshape(part, shape), dtype)
            for (name, dtype, shape), part in zip(inputs, parts, strict=True)
        }
        # Only `loaded` keeps the variables alive, so the function must hold on to it.
        return tf.cast(loaded.signatures[endpoint](**columns)[output_name], tf.float32)

    return LoadedModel(path, signature, call)


def _layout_of_inputs(
    path: Path, specs: dict[str, tf.TensorSpec], features: Sequence[str]
) -> InputLayout:
    """The layout of a SavedModel without signature: several inputs are columns by their names."""
    shapes = {
        name: _known_shape(path, f"input {name!r}", _only_shape(path, "input", spec.shape))
        for name, spec in sorted(specs.items())
    }
    if len(shapes) == 1:
        return name_columns(features, next(iter(shapes.values())), str(path))
    if features:
        raise ModelFileError(
            f"--features has no effect: {path} names its columns {', '.join(shapes)} itself. "
            "Remove it."
        )
    return unlabelled_layout(list(shapes.items()))


def _endpoint(
    path: Path, loaded: Any, name: str
) -> tuple[dict[str, tf.TensorSpec], str, tf.TensorSpec]:
    """Inputs by name, and name and type of the output, of one of a SavedModel's signatures."""
    serve = getattr(loaded, "signatures", {}).get(name)
    if serve is None:
        raise ModelFileError(
            f"{path} has no signature named {name}. Save it with Keras's model.export, or "
            "with tf.saved_model.save(model, path, signatures=function)."
        )
    specs = serve.structured_input_signature[1]
    outputs = serve.structured_outputs
    if len(outputs) != 1 or not specs:
        raise ModelFileError(
            f"{path} takes {', '.join(specs) or 'nothing'} and gives {', '.join(outputs)}; inputs, "
            "and one output, are allowed. Save a signature that gives the prediction alone."
        )
    texts = [
        name
        for name, spec in specs.items()
        if not (spec.dtype.is_integer or spec.dtype.is_floating or spec.dtype.is_bool)
    ]
    if texts:
        raise ModelFileError(
            f"{path}: input {texts[0]!r} is of {specs[texts[0]].dtype.name}; numbers and booleans "
            "are allowed. Save a signature that takes numbers."
        )
    ((output_name, output_spec),) = outputs.items()
    return specs, output_name, output_spec


def _refuse_old_h5(path: Path) -> None:
    """Files of Keras 2 load without an error in Keras 3 and then predict wrongly."""
    try:
        with h5py.File(path) as file:
            has_model = "model_config" in file.attrs
            version = file.attrs.get("keras_version", "")
    except OSError as error:
        raise _not_loaded(path, error) from error
    if not has_model:
        raise ModelFileError(
            f"{path} holds weights without a model; whole models are allowed. Save the model with "
            "model.save."
        )
    version = version.decode() if isinstance(version, bytes) else str(version)
    if not version.startswith("3."):
        raise ModelFileError(
            f"{path} was written by Keras {version or 'of unknown version'}; files of Keras 3 are "
            "loaded as they are. Convert it with `lockstep models import FILE --name NAME`."
        )


def _compile_record(path: Path, model: keras.Model) -> dict[str, Any] | None:
    """Loss and metrics in a Keras file, read without building them, or None."""
    try:
        if path.suffix.lower() in _H5_SUFFIXES:
            with h5py.File(path) as file:
                config = json.loads(file.attrs.get("training_config", "null"))
        else:
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read("config.json")).get("compile_config")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _not_loaded(path, error) from error
    if not config:
        return None
    penalties = [
        float(variable.regularizer(variable))
        for variable in model.trainable_variables
        if variable.regularizer is not None
    ]
    return {
        **{name: config.get(name) for name in _COMPILE_NAMES},
        "weight_penalty": sum(penalties, 0.0),
    }


def _only_shape(path: Path, what: str, shape: Any) -> tuple[int | None, ...]:
    """Shape of one row where a model has one input (or output) with rows as its first axis."""
    if isinstance(shape, tf.TensorShape):
        shape = tuple(shape.as_list()) if shape.rank is not None else None
    is_one = isinstance(shape, tuple) and all(isinstance(axis, int | None) for axis in shape)
    if not is_one or not shape:
        raise ModelFileError(
            f"{path} has {what}s {shape}; a model with one {what} is allowed. Wrap it in a model "
            f"of one {what}."
        )
    if shape[0] is not None:
        raise ModelFileError(
            f"{path} takes {shape[0]} rows at a time, no more and no fewer; any number of rows "
            "must be allowed. Build the model without a fixed batch size."
        )
    return tuple(shape[1:])


def _known_shape(path: Path, what: str, shape: tuple[int | None, ...]) -> tuple[int, ...]:
    known = tuple(axis for axis in shape if axis is not None)
    if len(known) != len(shape):
        raise ModelFileError(
            f"{path}: the {what} of shape {list(shape)} has axes of any length; fixed lengths are "
            f"needed without a {SIGNATURE_FILE}. Build the model for a fixed shape."
        )
    return known


def _check_fit(path: Path, shape: tuple[int | None, ...], layout: InputLayout) -> None:
    """Whether a signature is that of the model it lies beside."""
    wanted = layout.input_shape
    is_same = len(shape) == len(wanted) and all(
        axis in (None, given) for axis, given in zip(shape, wanted, strict=True)
    )
    if not is_same and not (shape == () and wanted == (1,)):
        raise ModelFileError(
            f"{path} takes rows of shape {list(shape)}, the {SIGNATURE_FILE} beside it says "
            f"{list(wanted)}: they belong to different models. Put them into folders of their own."
        )


def _check_names(path: Path, names: set[str], layout: InputLayout) -> None:
    """Whether a signature names the inputs of the SavedModel it lies beside."""
    columns = [column.name for column in layout.features]
    if names != set(columns):
        raise ModelFileError(
            f"{path} takes {', '.join(sorted(names))}, the {SIGNATURE_FILE} beside it says "
            f"{', '.join(columns)}: they belong to different models. Put them into folders of "
            "their own."
        )


def _not_loaded(path: Path, error: BaseException) -> ModelFileError:
    reason = " ".join(str(error).split())[:300]
    return ModelFileError(
        f"cannot load {path} ({type(error).__name__}: {reason}). Whole files of Keras 3 and "
        "TensorFlow 2 are allowed, without Lambda layers and classes of your own. For a model with "
        "such classes give its saved_model folder."
    )
