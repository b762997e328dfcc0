"""The process that imports: from a model file to an artifact folder.

Run as `python -m trainer.import_worker` by `trainer.importing`, which limits it; reads a request on
standard input, prints one line with the answer. The file is checked (`trainer.safety`,
`trainer.graph_safety`) before Keras or TensorFlow see it. What was written is loaded again as
serving does, and must predict the same.
"""

import ctypes
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from configs.errors import LockstepError
from data_pipeline.features import InputLayout
from data_pipeline.naming import name_columns, unlabelled_layout
from trainer.errors import ImportRefused
from trainer.export import write_artifact, write_manifest
from trainer.graph_safety import check_saved_model
from trainer.importing import ImportRequest, print_answer
from trainer.legacy.archive import is_old_archive, read_old_archive
from trainer.legacy.file import OldModel, is_old_h5, read_old_h5
from trainer.legacy.network import rebuild
from trainer.legacy.saved_model import read_old_saved_model
from trainer.legacy.training import compile_as_before
from trainer.model import with_one_input
from trainer.safety import check_config, check_h5, unpack_archive
from trainer.servable import write_servable

_PR_SET_PDEATHSIG = 1
_H5_MAGIC = b"\x89HDF\r\n\x1a\n"
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_ALLOWED = "a .keras or .h5 file, or a SavedModel or artifact folder, is allowed"
_ROWS = 4
_TOLERANCE = 1e-5


@dataclass
class Found:
    """A model that was read.

    Attributes:
        model: The Keras model; None where there is a servable SavedModel only.
        format: What the file was.
        notes: What the user should know.
    """

    model: keras.Model | None
    format: str
    notes: list[str] = field(default_factory=list)


def import_file(request: ImportRequest, scratch: Path) -> dict[str, Any]:
    """Import a file and write the artifact.

    Args:
        request: What is to be imported.
        scratch: An empty folder for what is unpacked.

    Returns:
        The fields of `trainer.importing.Imported`.

    Raises:
        ImportRefused: The file is damaged, could run code, or has no equal in Keras 3.
    """
    path = _file_in(Path(request.path))
    limit = request.memory_mb * 1_000_000 // 2
    found = _read(path, request, scratch, limit)
    lineage = {
        "imported": {"file": path.name, "format": found.format, "sha256": _digest(path)},
        "changes": found.notes,
    }
    folder = Path(request.folder)
    if found.model is None:
        write_servable(path, folder, request, lineage)
        return _answer(found, False, lineage)
    layout = _layout(found.model, request, found.notes)
    model = with_one_input(found.model, layout)
    _check_output(model)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)  # else its file does not load without a warning
    layout = _with_label(layout, model, request.label)
    write_artifact(folder, model, layout, lineage, True, True)
    if not _loads_again(folder, model, layout, found.notes):
        for name in ("model.keras", "trained_model.h5"):
            (folder / name).unlink(missing_ok=True)
        write_manifest(folder, lineage)
        return _answer(found, False, lineage)
    return _answer(found, True, lineage)


def _answer(found: Found, can_train: bool, lineage: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": found.format,
        "warnings": found.notes,
        "can_train": can_train,
        "lineage": lineage,
    }


def _file_in(path: Path) -> Path:
    """The model in an artifact folder; any other path as it is."""
    if path.is_dir() and not (path / "saved_model.pb").exists():
        for name in ("model.keras", "trained_model.h5", "saved_model"):
            if (path / name).exists():
                return path / name
        raise ImportRefused(f"the folder {path.name} holds no model; {_ALLOWED}.")
    return path


def _read(path: Path, request: ImportRequest, scratch: Path, limit: int) -> Found:
    if path.is_dir():
        return _read_saved_model(path, request)
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(b"PK"):
        return _read_archive(path, request, scratch, limit)
    if head == _H5_MAGIC:
        check_h5(path, limit)
        if is_old_h5(path):
            return _rebuilt(read_old_h5(path), "h5", request)
        return _read_h5(path, request)
    if head.startswith(_PICKLES):
        raise ImportRefused(
            f"{path.name} is a pickle, a program that runs when it is opened; {_ALLOWED}. Save the "
            "model with model.save."
        )
    raise ImportRefused(
        f"{path.name} begins with {head!r}, which no model file does; {_ALLOWED}. Save the model "
        "with model.save."
    )


def _rebuilt(old: OldModel, form: str, request: ImportRequest) -> Found:
    try:
        model, notes = rebuild(old, request.input_shape or None)
        compile_as_before(model, old, notes.append)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ImportRefused(
            f"the description of the model is not one that Keras wrote ({type(error).__name__}: "
            f"{error}), or one that is not known yet. Save the model again."
        ) from error
    described = f"{form} of Keras {old.version} ({old.backend})"
    return Found(model, described, [*old.notes, *notes])


def _read_archive(path: Path, request: ImportRequest, scratch: Path, limit: int) -> Found:
    unpack_archive(path, scratch, limit)
    weights = scratch / "model.weights.h5"
    if weights.exists():
        check_h5(weights, limit)
    config = _json(scratch / "config.json")
    metadata = _json(scratch / "metadata.json") if (scratch / "metadata.json").exists() else {}
    version = str(metadata.get("keras_version", "3"))
    if is_old_archive(metadata):
        return _rebuilt(read_old_archive(config, metadata, weights), ".keras", request)
    compiled = config.pop("compile_config", None) if isinstance(config, dict) else None
    notes: list[str] = []
    model = _loaded(path, request, config, compiled, notes)
    return Found(model, f".keras of Keras {version}", notes)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ImportRefused(
            f"the archive's {path.name} cannot be read ({error}). Save the model again."
        ) from error


def _read_h5(path: Path, request: ImportRequest) -> Found:
    try:
        with h5py.File(path) as file:
            config = json.loads(file.attrs["model_config"])
            training = json.loads(file.attrs.get("training_config", "null"))
            version = file.attrs.get("keras_version", "3")
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ImportRefused(
            f"the description of the model in {path.name} cannot be read ({error}). Save the model "
            "again."
        ) from error
    notes: list[str] = []
    model = _loaded(path, request, config, training, notes)
    return Found(model, f"h5 of Keras {version}", notes)


def _loaded(
    path: Path, request: ImportRequest, config: Any, compiled: Any, notes: list[str]
) -> keras.Model:
    """A file of Keras 3, by Keras itself; without loss and metrics of the author's own."""
    has_compile = bool(compiled)
    if not request.is_trusted:
        check_config(config)
        try:
            check_config(compiled)
        except ImportRefused as error:
            has_compile = False
            notes.append(f"loss, metrics and optimizer are left out: {error}")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = keras.saving.load_model(
                path, compile=has_compile, safe_mode=not request.is_trusted
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise ImportRefused(
            f"Keras {keras.__version__} cannot load {path.name} ({type(error).__name__}: {reason})."
            " Whole files without classes of your own are allowed. Save the model again."
        ) from error
    if any("optimizer" in str(warning.message) for warning in said):
        notes.append("the optimizer begins anew; the file holds no state that fits it")
    return model


def _read_saved_model(path: Path, request: ImportRequest) -> Found:
    check_saved_model(path, request.is_trusted)
    why = "it tells nothing of its layers"
    if (path / "keras_metadata.pb").exists():
        try:
            old = read_old_saved_model(path)
            return _rebuilt(old, "SavedModel", request)
        except ImportRefused as error:
            why = str(error)
    return Found(
        None,
        "SavedModel",
        [f"imported to predict only, not to be trained on, because it is a SavedModel: {why}"],
    )


def _layout(model: keras.Model, request: ImportRequest, notes: list[str]) -> InputLayout:
    """The columns that make the model's input."""
    inputs = list(model.inputs or [])
    if len(inputs) > 1:
        if request.features:
            raise ImportRefused(
                f"--features has no effect: the model names its inputs "
                f"{', '.join(tensor.name for tensor in inputs)} itself. Remove it."
            )
        return unlabelled_layout(
            [(tensor.name, _column_shape(_known(tensor.shape, ()))) for tensor in inputs]
        )
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple):
        raise ImportRefused(
            f"the model takes {shape}; one input, or inputs with names, are allowed. Wrap it in a "
            "model of one input."
        )
    known = _known(shape, request.input_shape)
    features = request.features
    if not features:
        features = ("features",)
        kind = "lists" if math.prod(known) > 1 else "numbers"
        notes.append(f"the input is the column 'features' of {kind}; --features gives other names")
    return name_columns(features, known, Path(request.path).name)


def _column_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if math.prod(shape) == 1 and len(shape) < 2 else shape


def _known(shape: Any, given: tuple[int, ...]) -> tuple[int, ...]:
    axes = tuple(shape[1:])
    if given and len(given) == len(axes):
        axes = tuple(a if a is not None else g for a, g in zip(axes, given, strict=True))
    if None in axes:
        raise ImportRefused(
            f"the model takes rows of shape {list(axes)}, with axes of any length; a signature has "
            "fixed ones. Give --input-shape, such as --input-shape 28,28,1."
        )
    return axes


def _check_output(model: keras.Model) -> None:
    shape = model.output_shape
    if not isinstance(shape, tuple) or any(not isinstance(axis, int | None) for axis in shape):
        raise ImportRefused(
            f"the model gives {shape}; one output is allowed. Wrap it in a model of the "
            "output that is wanted."
        )


def _with_label(layout: InputLayout, model: keras.Model, label: str) -> InputLayout:
    """The layout with a label as the loss wants it: class numbers, or numbers like the output."""
    compiled = model.get_compile_config() or {}
    is_class = "sparse" in json.dumps(compiled.get("loss"), default=str).lower()
    shape = model.output_shape[1:-1] if is_class else model.output_shape[1:]
    size = math.prod(axis or 1 for axis in shape)
    return replace(
        layout,
        label=label,
        label_dtype="int64" if is_class else "float32",
        label_size=max(1, size),
    )


def _loads_again(folder: Path, model: keras.Model, layout: InputLayout, notes: list[str]) -> bool:
    """Whether what was written loads without trust, and predicts as the model does.

    Raises:
        ImportRefused: It predicts something else.
    """
    rows = np.random.default_rng(0).uniform(0, 1, (_ROWS, *layout.input_shape)).astype(np.float32)
    wanted = _predicted(model, rows)
    try:
        # What Keras itself would let pass, the check does not.
        with zipfile.ZipFile(folder / "model.keras") as archive:
            check_config(json.loads(archive.read("config.json")))
        again = keras.saving.load_model(folder / "model.keras", compile=False, safe_mode=True)
    except Exception as error:
        notes.append(
            "imported to predict only: it holds code, which is loaded nowhere but in its "
            f"SavedModel ({type(error).__name__})"
        )
        return False
    _check_same(wanted, _predicted(again, rows), "model.keras")
    return True


def _predicted(model: keras.Model, rows: NDArray[np.float32]) -> NDArray[Any]:
    return np.asarray(model(tf.constant(rows), training=False), np.float64)


def _check_same(wanted: NDArray[Any], got: NDArray[Any], name: str) -> None:
    if not np.allclose(wanted, got, atol=_TOLERANCE, rtol=_TOLERANCE, equal_nan=True):
        raise ImportRefused(
            f"the {name} that was written predicts otherwise than the model it came from, by "
            f"up to {np.abs(wanted - got).max():.3g}. Please report this; nothing was imported."
        )


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as opened:
            while data := opened.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()


def main(read: Callable[[], str] = sys.stdin.read) -> None:
    """Read a request, print one line with the answer."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    described = json.loads(read())
    for name in ("features", "input_shape"):
        described[name] = tuple(described[name])
    request = ImportRequest(**described)
    scratch = Path(tempfile.mkdtemp(prefix="lockstep-import-"))
    try:
        print_answer(import_file(request, scratch))
    except LockstepError as error:
        print_answer({"refused": str(error)})
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
