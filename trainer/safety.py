"""What a model file may hold: checked before Keras or TensorFlow see any of it.

A model file is a program of somebody's. Owns what is allowed: Keras's own classes by name, from the
catalogue; archives and HDF5 files that reach nowhere but into themselves and do not grow out of
proportion. Graphs of SavedModels are checked by `trainer.graph_safety`. Nothing here executes or
instantiates anything of the file.
"""

import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras

from configs.catalog import catalog
from trainer.errors import ImportRefused

TRUST = "Import it with --trust only if you know who made it."

# Classes in the catalogue that run code or read files by their nature.
_RUNS_CODE = {
    "Lambda": "runs a function that is stored in the file",
    "TFSMLayer": "loads another file",
    "TorchModuleWrapper": "unpickles a module",
    "JaxLayer": "runs a function of its author's",
    "FlaxLayer": "runs a module of its author's",
}
_STRUCTURES = {
    "Functional",
    "Sequential",
    "Model",
    "DTypePolicy",
    "DTypePolicyMap",
    "SeedGenerator",
}
_STRUCTURES |= {"__tuple__", "TensorShape", "__keras_tensor__", "__tensor__", "__numpy__", "dtype"}
_STRUCTURES |= {"slice", "__ellipsis__", "Ellipsis", "CompileLoss", "CompileMetrics", "Operation"}
_MODULES = re.compile(
    r"keras(\.src)?(\.(layers|models|initializers|regularizers|constraints|activations|losses|"
    r"metrics|optimizers|dtype_policies|random|quantizers|ops|backend|engine)(\.\w+)*)?|builtins"
)
_DIALS_OUT = ("vocabulary", "idf_weights", "filepath")
_OPERATION = re.compile(r"[A-Z]\w*")
_IN_ARCHIVE = re.compile(r"(metadata\.json|config\.json|model\.weights\.(h5|npz)|assets/[\w./ -]*)")
_GROWTH = 200


def check_config(value: Any, depth: int = 0) -> None:
    """Whether a configuration of Keras 3 names Keras's own objects only.

    Raises:
        ImportRefused: It names something that could run code or read a file.
    """
    if depth > 200:
        raise ImportRefused("the model's configuration is nested too deeply. Rebuild the model.")
    if isinstance(value, list):
        for item in value:
            check_config(item, depth + 1)
    if not isinstance(value, dict):
        return
    if "class_name" in value:
        _check_object(value)
    for key, item in value.items():
        if key in _DIALS_OUT and isinstance(item, str):
            raise ImportRefused(
                f"the model reads its {key} from the file {item[:80]!r}; a list of words is "
                f"allowed. {TRUST}"
            )
        check_config(item, depth + 1)


def _check_object(value: dict[str, Any]) -> None:
    name = str(value["class_name"])
    module = value.get("module")
    if name in _RUNS_CODE:
        raise ImportRefused(
            f"the model has a {name}, which {_RUNS_CODE[name]}; Keras's other layers are allowed. "
            f"{TRUST}"
        )
    if name == "__lambda__":
        raise ImportRefused(f"the model holds a function of its author's. {TRUST}")
    if module is not None and not _MODULES.fullmatch(str(module)):
        raise ImportRefused(
            f"the model has {name!r} of {str(module)[:80]!r}, code of its author's; classes of "
            f"Keras are allowed. {TRUST}"
        )
    if module is None and value.get("registered_name") not in (None, name) and name != "function":
        raise ImportRefused(
            f"the model has {name!r}, registered as {str(value['registered_name'])[:80]!r}: code "
            f"of its author's; classes of Keras are allowed. {TRUST}"
        )
    if name == "function":
        function = value.get("config")
        if isinstance(function, str) and _is_function(function):
            return
        raise ImportRefused(
            f"the model holds a function of its author's, {str(function)[:80]!r}; Keras's own are "
            f"allowed. {TRUST}"
        )
    is_operation = str(module or "").startswith("keras.src.ops.") and _OPERATION.fullmatch(name)
    if not is_operation and name not in _STRUCTURES and not _is_known(name):
        raise ImportRefused(
            f"the model has {name!r}, which is no class of Keras; Keras's classes are allowed. "
            f"{TRUST}"
        )


def _is_known(name: str) -> bool:
    return any(name in table["classes"] or name in table["aliases"] for table in catalog().values())


def _is_function(name: str) -> bool:
    found = getattr(keras.activations, name, None)
    is_activation = callable(found) and name.islower()
    return is_activation or any(
        name in catalog()[kind]["aliases"] for kind in ("losses", "metrics")
    )


def unpack_archive(path: Path, folder: Path, limit_bytes: int) -> None:
    """Unpack a `.keras` archive after its list of files was checked.

    Raises:
        ImportRefused: It reaches out of itself, holds what no model has, or is too large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(entries, path.stat().st_size, limit_bytes)
            for entry in entries:
                if entry.is_dir():
                    continue
                target = folder / entry.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                left = entry.file_size
                with archive.open(entry) as source, target.open("wb") as copy:
                    while left > 0 and (data := source.read(min(left, 1 << 20))):
                        copy.write(data)
                        left -= len(data)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ImportRefused(
            f"{path.name} is no whole .keras archive ({error}). Copy it again, or save it again."
        ) from error


def _check_entries(entries: list[zipfile.ZipInfo], size_bytes: int, limit_bytes: int) -> None:
    seen: set[str] = set()
    for entry in entries:
        name = entry.filename
        is_link = stat.S_ISLNK(entry.external_attr >> 16)
        if is_link or ".." in name.split("/") or name.startswith("/") or "\\" in name:
            raise ImportRefused(
                f"the archive's entry {name[:80]!r} reaches out of the archive. Do not use this "
                "file: no version of Keras writes such an entry."
            )
        if not entry.is_dir() and not _IN_ARCHIVE.fullmatch(name):
            raise ImportRefused(
                f"the archive holds {name[:80]!r}, which no .keras file has. Save the model again "
                "with model.save."
            )
        if name in seen:
            raise ImportRefused(f"the archive holds {name[:80]!r} twice. Save the model again.")
        seen.add(name)
    total = sum(entry.file_size for entry in entries)
    if total > limit_bytes or total > 2**20 + _GROWTH * size_bytes:
        raise ImportRefused(
            f"the archive of {size_bytes:,} bytes unpacks to {total:,}; {limit_bytes:,}, and "
            f"{_GROWTH} times its size, are allowed. Raise --memory-mb if the model is that large."
        )
    if "config.json" not in seen:
        raise ImportRefused("the archive has no config.json, so it is no .keras file.")


def check_h5(path: Path, limit_bytes: int) -> None:
    """Whether an HDF5 file keeps to itself and to its size.

    Raises:
        ImportRefused: It links to other files, or its arrays are larger than allowed.
    """
    total = 0
    try:
        with h5py.File(path, "r") as file:
            for name, item in _items(file):
                if isinstance(item, h5py.ExternalLink | h5py.SoftLink):
                    raise ImportRefused(
                        f"{path.name}: {name[:80]!r} is a link to elsewhere. Do not use this file: "
                        "no version of Keras writes such an entry."
                    )
                if isinstance(item, h5py.Dataset):
                    if item.external or item.is_virtual:
                        raise ImportRefused(
                            f"{path.name}: the array {name[:80]!r} lies in another file. Do not "
                            "use this file: no version of Keras writes such an entry."
                        )
                    total += item.nbytes
    except (OSError, RuntimeError, KeyError, ValueError, RecursionError) as error:
        raise ImportRefused(
            f"{path.name} cannot be read ({error}); whole HDF5 files are allowed. Copy it again."
        ) from error
    allowed = min(limit_bytes, 2**20 + _GROWTH * path.stat().st_size)
    if total > allowed:
        raise ImportRefused(
            f"the arrays of {path.name} take {total:,} bytes; {allowed:,} are allowed. Raise "
            "--memory-mb if the model is that large."
        )


def _items(group: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """All links and arrays of a file; links are not followed."""
    if depth > 50:
        raise ValueError("groups are nested too deeply")
    for name in group:
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink | h5py.SoftLink):
            yield f"{prefix}/{name}", link
            continue
        item = group[name]
        yield f"{prefix}/{name}", item
        if isinstance(item, h5py.Group):
            yield from _items(item, f"{prefix}/{name}", depth + 1)
