"""Arrays in memory and `tf.data` datasets as the data of a job.

Workers are other processes, on other machines even: rows go to them by way of Parquet files, which
are written once into a folder named by a hash of the rows, whole or not at all.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.converted import Converted, PartWriter, find_converted, home, new_folder, publish
from data_pipeline.errors import DataError
from data_pipeline.formats.numpy_files import array_column
from data_pipeline.formats.pieces import BATCH_BYTES

LABEL = "y"
WEIGHT = "w"
ONLY_FEATURE = "x"

_INFINITE = -1
_MAX_BATCH_ROWS = 4_096

Columns = dict[str, NDArray[Any]]


def from_arrays(
    train: tuple[Any, ...],
    validation: tuple[Any, ...] | None = None,
    test: tuple[Any, ...] | None = None,
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """The `data` section of a job for arrays, as Keras's `fit` takes them.

    The rows are written as Parquet; the same rows are not written twice. Blocks until done; safe to
    call from several threads and processes.

    Args:
        train: `(x, y)` or `(x, y, weight)`. `x` is an array `(rows, ...)`, which becomes the column
            `x`, or a mapping of column names to such arrays; text is allowed there. `y` is
            `(rows,)` or `(rows, values)`, `weight` `(rows,)`.
        validation: The same for the rows of validation. Without weights where `train` has some, all
            count 1.
        test: The same for the rows of the test.
        folder: Where the files go; all workers must reach it. None: `arrays` below LOCKSTEP_HOME.

    Returns:
        `train`, `validation`, `test`, `features`, `label` and `weight` of the section, for
        `lockstep.train`; other settings can be added.

    Raises:
        DataError: Arrays of different numbers of rows, or of a type that has no columns.
        ConvertError: The files cannot be written.
    """
    place = _place(folder)
    roles: dict[str, list[Columns]] = {}
    for role, data in (("train", train), ("validation", validation), ("test", test)):
        if data is not None:
            roles[role] = [_columns(role, data, has_weights=len(train) > 2)]
    _check_alike({role: columns[0] for role, columns in roles.items()})
    section: dict[str, Any] = {}
    for role, columns in roles.items():
        digest = _Digest()
        digest.add(columns[0])
        stored = find_converted(place / digest.hex)
        section[role] = str((stored or _stored(role, columns, place)).folder)
    return {**section, **_described(roles["train"][0])}


def from_dataset(
    train: Any,
    validation: Any = None,
    test: Any = None,
    folder: str | Path | None = None,
    is_batched: bool | None = None,
) -> dict[str, Any]:
    """The `data` section of a job for `tf.data` datasets; their order is the order of training.

    Each dataset is read once, from its start to its end, and written as Parquet. What it shuffles
    stays as it came the first time, in all epochs.

    Args:
        train: A `tf.data.Dataset` of `(x, y)` or `(x, y, weight)`, rows or batches of rows; `x` is
            a tensor, which becomes the column `x`, or a mapping of column names to tensors.
        validation: The same for the rows of validation.
        test: The same for the rows of the test.
        folder: Where the files go; all workers must reach it. None: `arrays` below LOCKSTEP_HOME.
        is_batched: Whether elements are batches. None: told by their shapes.

    Returns:
        What `from_arrays` returns, and `shuffle: none`.

    Raises:
        DataError: A dataset without end, or elements that are no rows.
        ConvertError: The files cannot be written.
    """
    place = _place(folder)
    section: dict[str, Any] = {}
    first: dict[str, Columns] = {}
    datasets = {"train": train, "validation": validation, "test": test}
    has_weights = len(_specs("train", train)) > 2
    for role, dataset in datasets.items():
        if dataset is not None:
            batches = _batches_of(role, dataset, is_batched, has_weights)
            first[role] = next(batches, {})
            if not first[role]:
                raise DataError(f"{role}: the dataset has no element; at least one is needed.")
            _check_alike(first)
            stored = _stored(role, _chained(first[role], batches), place)
            section[role] = str(stored.folder)
    return {**section, **_described(first["train"]), "shuffle": "none"}


def _place(folder: str | Path | None) -> Path:
    return home() / "arrays" if folder is None else Path(folder).expanduser().absolute()


def _columns(role: str, data: Any, has_weights: bool) -> Columns:
    """The columns of `(x, y)` or `(x, y, weight)`, all of the same number of rows."""
    if not isinstance(data, tuple | list) or len(data) not in (2, 3):
        raise DataError(
            f"{role} received {type(data).__name__}"
            f"{f' of {len(data)}' if isinstance(data, tuple | list) else ''}; (x, y) or (x, y, "
            "weight) is allowed."
        )
    x, y, *weights = data
    # A table of pandas's is no Mapping, but has keys and columns like one.
    names = list(x.keys()) if hasattr(x, "keys") else None
    columns = {ONLY_FEATURE: _array(role, x)} if names is None else _named(x, names, role)
    label = _array(role, y)
    if label.ndim == 2 and label.shape[1] == 1:
        label = label[:, 0]
    columns[LABEL] = label
    if weights or has_weights:
        weight = _array(role, weights[0]) if weights else np.ones(label.shape[:1], np.float32)
        columns[WEIGHT] = weight
    _check_rows(role, columns)
    return columns


def _named(x: Any, names: list[Any], role: str) -> Columns:
    taken = [name for name in names if name in (LABEL, WEIGHT) or not isinstance(name, str)]
    if taken or not names:
        received = f"a column {taken[0]!r}" if taken else "no column"
        raise DataError(
            f"{role}: x has {received}; names other than {LABEL!r} (the label) and {WEIGHT!r} (the "
            "weight) are allowed. Rename the column."
        )
    return {name: _array(role, x[name]) for name in names}


def _array(role: str, values: Any) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise DataError(
            f"{role}: received values that are no array ({error}); rows of one shape are allowed. "
            "Pad or cut them."
        ) from None


def _check_rows(role: str, columns: Columns) -> None:
    rows = {name: values.shape[:1] for name, values in columns.items()}
    if len(set(rows.values())) > 1 or () in rows.values():
        counts = ", ".join(f"{name} {values.shape}" for name, values in columns.items())
        raise DataError(
            f"{role}: received shapes {counts}; the same first axis, which counts rows, is needed. "
            "Cut the arrays to the same rows."
        )
    if rows[LABEL] == (0,):
        raise DataError(f"{role}: the arrays have no row; at least one is needed.")
    label, weight = columns[LABEL], columns.get(WEIGHT)
    if label.ndim > 2:
        raise DataError(
            f"{role}: the label has shape {label.shape}; (rows,) or (rows, values) is allowed. "
            "Flatten each row's label."
        )
    if weight is not None and (weight.ndim != 1 or weight.dtype.kind not in "iufb"):
        raise DataError(
            f"{role}: the weight has shape {weight.shape} of {weight.dtype}; one number a row is "
            "allowed."
        )


def _check_alike(roles: Mapping[str, Columns]) -> None:
    """Whether all roles have the columns of the training rows, of the same shapes."""
    train = {name: values.shape[1:] for name, values in roles["train"].items()}
    for role, columns in roles.items():
        shapes = {name: values.shape[1:] for name, values in columns.items()}
        if shapes != train:
            raise DataError(
                f"{role}: a row has the columns and shapes {shapes}, in train {train}; the same "
                "are needed."
            )


def _described(columns: Columns) -> dict[str, Any]:
    """Features, label and weight of a section."""
    features: list[dict[str, Any]] = []
    for name, values in columns.items():
        if name not in (LABEL, WEIGHT):
            shape = {"shape": list(values.shape[1:])} if values.ndim > 1 else {}
            features.append({"name": name, **shape})
    weight = {"weight": WEIGHT} if WEIGHT in columns else {}
    return {"features": features, "label": LABEL, **weight}


class _Digest:
    """A hash of columns that does not depend on the batches they come in."""

    def __init__(self) -> None:
        self._columns: dict[str, tuple[str, Any]] = {}

    def add(self, columns: Columns) -> None:
        for name, values in columns.items():
            about = f"{name} {values.dtype} {values.shape[1:]}"
            _, digest = self._columns.setdefault(name, (about, hashlib.sha256()))
            if values.dtype.kind in "OT":
                for value in values.reshape(-1).tolist():
                    digest.update(repr(value).encode("utf-8", "surrogatepass") + b"\n")
            else:
                digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    @property
    def hex(self) -> str:
        """Sixteen hex digits."""
        found = [(about, digest.hexdigest()) for about, digest in self._columns.values()]
        return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _stored(role: str, batches: Iterable[Columns], place: Path) -> Converted:
    """Write rows below `place`, into the folder that their hash names."""
    digest = _Digest()
    with new_folder(place) as partial:
        with PartWriter(partial / "part-000000.parquet") as part:
            for columns in batches:
                digest.add(columns)
                for piece in _sliced(columns):
                    part.write(_record_batch(role, piece))
        return publish(partial, place / digest.hex, [part], {"role": role, "kind": "arrays"})


def _sliced(columns: Columns) -> Iterator[Columns]:
    rows = len(columns[LABEL])
    row_bytes = sum(values.nbytes for values in columns.values()) / rows if rows else 1
    size = max(1, int(BATCH_BYTES // max(1, row_bytes)))
    for at in range(0, rows, size):
        yield {name: values[at : at + size] for name, values in columns.items()}


def _record_batch(role: str, columns: Columns) -> pa.RecordBatch:
    arrays = []
    for name, values in columns.items():
        try:
            arrays.append(array_column(values))
        except DataError as error:
            raise DataError(f"{role}: array {name!r} {error}") from None
    return pa.RecordBatch.from_arrays(arrays, list(columns))


def _chained(first: Columns, rest: Iterator[Columns]) -> Iterator[Columns]:
    yield first
    yield from rest


def _specs(role: str, dataset: Any) -> tuple[Any, ...]:
    """Types of x, y and the weight of a dataset's elements."""
    if not hasattr(dataset, "element_spec"):
        raise DataError(
            f"{role} received {type(dataset).__name__}; a tf.data.Dataset is allowed. For arrays "
            "there is lockstep.from_arrays."
        )
    spec = dataset.element_spec
    if not isinstance(spec, tuple) or len(spec) not in (2, 3):
        raise DataError(
            f"{role}: the dataset's elements are {spec}; (x, y) or (x, y, weight) is allowed. Map "
            "it to such pairs."
        )
    return spec


def _batches_of(
    role: str, dataset: Any, is_batched: bool | None, has_weights: bool
) -> Iterator[Columns]:
    """The rows of a dataset, some at a time, in its order."""
    x, *others = _specs(role, dataset)
    specs = [*(x.values() if isinstance(x, Mapping) else [x]), *others]
    for spec in specs:
        if type(spec).__name__ != "TensorSpec":
            raise DataError(
                f"{role}: the dataset holds {spec}; dense tensors are allowed. Map it with "
                "to_tensor() or tf.sparse.to_dense."
            )
    if int(dataset.cardinality()) == _INFINITE:
        raise DataError(
            f"{role}: the dataset is infinite; one that ends is allowed. Remove .repeat(): "
            "train.epochs says how often the rows are seen."
        )
    if not (_looks_batched(role, specs) if is_batched is None else is_batched):
        row_bytes = sum(spec.dtype.size * (spec.shape.num_elements() or 1) for spec in specs)
        dataset = dataset.batch(min(_MAX_BATCH_ROWS, max(1, BATCH_BYTES // max(1, row_bytes))))
    for element in dataset.as_numpy_iterator():
        x, *rest = element
        decoded = (
            {name: _text_of(role, values) for name, values in x.items()}
            if isinstance(x, Mapping)
            else _text_of(role, x)
        )
        yield _columns(role, (decoded, *(_text_of(role, values) for values in rest)), has_weights)


def _looks_batched(role: str, specs: list[Any]) -> bool:
    """Whether elements are batches, by the shapes of their tensors."""
    ranks = [spec.shape.rank for spec in specs]
    if 0 in ranks:
        return False
    leading = {
        None if rank is None else spec.shape[0] for spec, rank in zip(specs, ranks, strict=True)
    }
    if None not in ranks and len(leading) > 1:
        return False
    if None in ranks or (leading != {None} and max(ranks) == 1):
        raise DataError(
            f"{role}: the dataset's elements are {specs}, which may be batches or single rows. Say "
            "which with is_batched."
        )
    return True


def _text_of(role: str, values: Any) -> NDArray[Any]:
    """The array, with TensorFlow's bytes as text."""
    array = np.asarray(values)
    if array.dtype.kind not in "OS":
        return array
    try:
        texts = [value.decode() for value in array.reshape(-1).tolist()]
    except UnicodeDecodeError:
        raise DataError(
            f"{role}: the dataset holds bytes that are not UTF-8; text is allowed. Decode them."
        ) from None
    decoded = np.empty(array.size, object)
    decoded[:] = texts
    return decoded.reshape(array.shape)
