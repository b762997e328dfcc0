"""An artifact of a SavedModel that is no Keras model: it predicts, and cannot be trained on.

Owns the wrapping of its default signature into the one that artifacts have: raw columns by their
names in, `prediction` out.
"""

from pathlib import Path
from typing import Any

import tensorflow as tf

from data_pipeline.features import InputLayout
from data_pipeline.naming import name_columns, unlabelled_layout
from trainer.errors import ImportRefused
from trainer.export import signature_record, write_manifest, write_signature
from trainer.importing import ImportRequest

_DEFAULT = "serving_default"


class _Wrapped(tf.Module):  # type: ignore[misc]
    """Holds the loaded model, whose variables only live as long as it does."""

    def __init__(self, loaded: Any) -> None:
        super().__init__()
        self.loaded = loaded


def write_servable(
    path: Path, folder: Path, request: ImportRequest, lineage: dict[str, Any]
) -> None:
    """Write the artifact of a SavedModel.

    Raises:
        ImportRefused: It cannot be loaded, or is not one of rows in and one output.
    """
    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ImportRefused(
            f"TensorFlow cannot load {path.name} ({type(error).__name__}: {reason}). Copy the "
            "folder again."
        ) from error
    serve = getattr(loaded, "signatures", {}).get(_DEFAULT)
    if serve is None:
        raise ImportRefused(
            f"{path.name} has no signature {_DEFAULT}; save it with Keras's model.export, or with "
            "tf.saved_model.save(model, path, signatures=function)."
        )
    specs = serve.structured_input_signature[1]
    ((output, output_spec),) = _only_output(serve.structured_outputs)
    layout = _layout(specs, request)
    is_joined = len(specs) == 1
    ((only, only_spec),) = list(specs.items())[:1]
    width, names = layout.width, [column.name for column in layout.features]
    row_shape = [-1, *layout.input_shape] if only_spec.shape.rank > 1 else [-1]

    def predict(**columns: tf.Tensor) -> dict[str, tf.Tensor]:
        if is_joined:
            parts = [
                tf.reshape(columns[column.name], [-1, column.size]) for column in layout.features
            ]
            joined = tf.reshape(tf.concat(parts, axis=1), [-1, width])
            given = {only: tf.cast(tf.reshape(joined, row_shape), only_spec.dtype)}
        else:
            given = {
                name: tf.cast(
                    tf.reshape(columns[name], [-1, *specs[name].shape[1:]]), specs[name].dtype
                )
                for name in names
            }
        return {"prediction": tf.cast(serve(**given)[output], tf.float32)}

    inputs = {
        column.name: tf.TensorSpec((None, *column.shape), tf.float32, name=column.name)
        for column in layout.features
    }
    endpoint = tf.function(predict).get_concrete_function(**inputs)
    folder.mkdir(parents=True, exist_ok=True)
    tf.saved_model.save(
        _Wrapped(loaded), str(folder / "saved_model"), signatures={_DEFAULT: endpoint}
    )
    shape = tuple(axis or 1 for axis in output_spec.shape[1:])
    write_signature(folder, signature_record(layout, shape, None))
    write_manifest(folder, lineage)


def _only_output(outputs: dict[str, Any]) -> list[tuple[str, Any]]:
    if len(outputs) != 1:
        raise ImportRefused(
            f"the SavedModel gives {', '.join(sorted(outputs)) or 'nothing'}; one output is "
            "allowed. Save a signature that gives the prediction alone."
        )
    return list(outputs.items())


def _layout(specs: dict[str, tf.TensorSpec], request: ImportRequest) -> InputLayout:
    for name, spec in specs.items():
        if not (spec.dtype.is_integer or spec.dtype.is_floating or spec.dtype.is_bool):
            raise ImportRefused(
                f"the SavedModel's input {name!r} is of {spec.dtype.name}; numbers and booleans "
                "are allowed. Save a signature that takes numbers."
            )
    shapes = {name: _shape(name, spec, request) for name, spec in sorted(specs.items())}
    if len(shapes) == 1:
        features = request.features or ("features",)
        return name_columns(features, next(iter(shapes.values())), Path(request.path).name)
    if request.features or not shapes:
        raise ImportRefused(
            f"--features has no effect: the SavedModel names its columns {', '.join(shapes)} "
            "itself. Remove it."
        )
    return unlabelled_layout([(n, () if s in ((), (1,)) else s) for n, s in shapes.items()])


def _shape(name: str, spec: tf.TensorSpec, request: ImportRequest) -> tuple[int, ...]:
    if spec.shape.rank is None or spec.shape.rank == 0 or spec.shape[0] is not None:
        raise ImportRefused(
            f"the SavedModel's input {name!r} has the shape {spec.shape}; any number of rows along "
            "the first axis is allowed. Save it again without a fixed batch size."
        )
    axes = tuple(spec.shape[1:])
    if request.input_shape and len(request.input_shape) == len(axes):
        axes = tuple(a or g for a, g in zip(axes, request.input_shape, strict=True))
    if None in axes:
        raise ImportRefused(
            f"the SavedModel's input {name!r} has the shape {list(axes)}, with axes of any length. "
            "Give --input-shape, such as --input-shape 28,28,1."
        )
    return axes
