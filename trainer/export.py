"""The artifact: everything that serving, or a colleague with plain Keras, needs of a trained model.

    model.keras         the model with its optimizer; takes raw rows `(rows, *input_shape)`
    trained_model.h5    the same in the older format
    saved_model/        takes raw columns by name, gives predictions
    signature.json      names, types and shapes of inputs and outputs
    manifest.json       digest of every file, lineage

Runs in a process of its own after training, outside any strategy, so that nothing of the cluster
sticks to the files. Written to a temporary folder; the coordinator renames it.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from cluster.channel import Channel
from cluster.template import Launch
from data_pipeline.encoding import ENCODED_ENDPOINT, encoding_record
from data_pipeline.features import InputColumn, InputLayout
from trainer import keras_adapter
from trainer.learner import example_batch
from trainer.model import build_model, parameter_count
from trainer.payloads import ExportPayload
from trainer.preprocessing import RawRows, raw_spec
from trainer.state import restore

_LEAVE_TIMEOUT_S = 120.0
_WEIGHTS_TIMEOUT_S = 120.0


def main(channel: Channel, launch: Launch) -> None:
    """The export stage: one rank, no strategy."""
    payload: ExportPayload = launch.payload
    job = payload.job
    model = build_model(job, payload.layout, payload.statistics)
    keras_adapter.build_training_state(model, *example_batch(payload.layout, False))
    restore(model, channel.take("weights", _WEIGHTS_TIMEOUT_S))
    channel.send("ready", None)
    channel.mark("export")
    folder = Path(payload.folder)
    write_artifact(
        folder, model, payload.layout, payload.lineage, job.export.h5, job.export.saved_model
    )
    channel.send("artifact", {"parameters": parameter_count(model)})
    channel.send("finished", None)
    channel.wait_for("leave", _LEAVE_TIMEOUT_S)


def write_artifact(
    folder: Path,
    model: keras.Model,
    layout: InputLayout,
    lineage: dict[str, Any],
    has_h5: bool,
    has_saved_model: bool,
) -> None:
    """Write all files of an artifact into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save(folder / "model.keras")
    if has_h5:
        model.save(folder / "trained_model.h5")
    if has_saved_model:
        _write_saved_model(folder / "saved_model", model, layout)
    write_signature(folder, model_signature(model, layout))
    write_manifest(folder, lineage)


def write_signature(folder: Path, signature: dict[str, Any]) -> None:
    """Write signature.json."""
    (folder / "signature.json").write_text(json.dumps(signature, indent=2) + "\n")


def model_signature(model: keras.Model, layout: InputLayout) -> dict[str, Any]:
    """Names, types and shapes of what the artifact takes and gives; null is the number of rows."""
    return signature_record(layout, tuple(model.output_shape[1:]), _compile_record(model))


def signature_record(
    layout: InputLayout, output_shape: tuple[int, ...], compiled: dict[str, Any] | None
) -> dict[str, Any]:
    """A signature, given the shape of a row's prediction, and loss and metrics or None."""
    return {
        "inputs": [_input_record(feature) for feature in layout.features],
        "model_input": {"dtype": "float32", "shape": [None, *layout.input_shape]},
        "outputs": [{"name": "prediction", "dtype": "float32", "shape": [None, *output_shape]}],
        "label": {
            "name": layout.label,
            "dtype": layout.label_dtype,
            "shape": [None, layout.label_size],
            "classes": None if layout.label_classes is None else list(layout.label_classes),
        },
        "weight": layout.weight,
        "compile": compiled,
    }


def _input_record(feature: InputColumn) -> dict[str, Any]:
    """A raw column; where it is encoded, also how, and the shape of its numbers."""
    if feature.encoding is None:
        return {"name": feature.name, "dtype": "float32", "shape": [None, *feature.shape]}
    return {
        "name": feature.name,
        "dtype": feature.encoding.raw_dtype,
        "shape": [None],
        "encoding": encoding_record(feature.encoding),
    }


def _compile_record(model: keras.Model) -> dict[str, Any] | None:
    """What an evaluation needs that has predictions only: loss, metrics, penalty on the weights."""
    config = model.get_compile_config()
    if not config:
        return None
    names = ("loss", "loss_weights", "metrics", "weighted_metrics")
    penalties = [float(part) for part in keras_adapter.weight_regularization(model)]
    return {**{name: config.get(name) for name in names}, "weight_penalty": sum(penalties, 0.0)}


def write_manifest(folder: Path, lineage: dict[str, Any]) -> None:
    """Digest every file of the folder; `digest` covers them all."""
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    whole = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    manifest = {"digest": whole, "files": files, "lineage": lineage}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _write_saved_model(folder: Path, model: keras.Model, layout: InputLayout) -> None:
    """A SavedModel whose default signature takes each raw column by its name."""
    rows = RawRows(layout)

    def predict(**columns: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"prediction": tf.cast(model(rows(columns), training=False), tf.float32)}

    def predict_encoded(rows: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"prediction": tf.cast(model(rows, training=False), tf.float32)}

    specs = {feature.name: raw_spec(feature) for feature in layout.features}
    archive = keras.export.ExportArchive()
    archive.track(model)
    for layer in rows.layers.values():
        archive.track(layer)
    endpoint = tf.function(predict)
    endpoint.get_concrete_function(**specs)  # the archive takes over what has been traced
    archive.add_endpoint("serve", endpoint)
    if layout.encodings:
        spec = tf.TensorSpec((None, *layout.input_shape), tf.float32, name="rows")
        archive.add_endpoint(ENCODED_ENDPOINT, predict_encoded, input_signature=[spec])
    archive.write_out(str(folder), verbose=False)
