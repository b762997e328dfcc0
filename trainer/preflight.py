"""Everything that can be known before a process starts: data, order, and whether they fit the job.

No TensorFlow: a mistake is told in well under two seconds. Whether the model itself can be built is
asked of `trainer.probe`, in a process of its own.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.catalog import is_own_code, split_spec
from configs.schema import Job
from data_pipeline.encoding import Encoding, read_encoding
from data_pipeline.errors import DataError
from data_pipeline.features import InputLayout, input_layout
from data_pipeline.ingest import ingested
from data_pipeline.plan import Plan, auto_window_rows
from data_pipeline.scan import Scan, learn, raise_for_nulls, scan
from data_pipeline.source import Source, open_source
from trainer.errors import ModelError
from trainer.payloads import PlannedData

_ONE_HOT_LOSSES = {"categorical_crossentropy", "categoricalcrossentropy"}
_CLASS_LOSSES = {"sparse_categorical_crossentropy", "sparsecategoricalcrossentropy"}
_BINARY_LOSSES = {
    *("bce", "binary_crossentropy", "binary_focal_crossentropy"),
    *("binarycrossentropy", "binaryfocalcrossentropy"),
}
_ELEMENTWISE_LOSSES = {
    *_BINARY_LOSSES,
    *("mse", "mae", "mape", "msle", "huber", "log_cosh", "logcosh", "poisson"),
    *("mean_squared_error", "mean_absolute_error", "mean_absolute_percentage_error"),
    "mean_squared_logarithmic_error",
    *("meansquarederror", "meanabsoluteerror", "meanabsolutepercentageerror"),
    "meansquaredlogarithmicerror",
}


def open_sources(
    job: Job,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    warned: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Source], InputLayout]:
    """Footers of all roles, checked against the job and each other, and vocabularies learned.

    Reads training rows only where a feature or the label is a category or a text.

    Files that are not Parquet are converted first, where that has not been done before.

    Args:
        job: The job.
        progress: Is called while files are converted: role, bytes done, bytes in all.
        warned: Is told of lines that are left out.

    Raises:
        DataError: Files, columns or types that the job cannot use.
        ModelError: An output that cannot fit the label.
        EnvironmentFailure: Files cannot be converted.
    """
    sources = {}
    for role in ("train", "validation", "test"):
        if (paths := getattr(job.data, role)) is not None:
            told = functools.partial(progress, role)
            parquet = ingested(role, paths, job.data, told, warned)
            sources[role] = open_source(role, parquet, job.data.columns)
    _check_same_columns(sources)
    layout = input_layout(job.data, sources["train"])
    check_output(job, layout)
    if job.data.on_null == "error":
        for role, source in sources.items():
            lists = {column.name for column in source.columns if column.is_list}
            counts = {
                (column, file.path): rows
                for file in source.files
                for column, rows in file.null_counts.items()
                if column not in lists  # footers count elements there; the scan counts rows
            }
            raise_for_nulls(role, counts, {job.data.label, job.data.weight})
    layout = layout.with_encodings(_earlier_encodings(job, layout))
    return sources, learn(sources["train"], layout, job.data.on_null)


def _earlier_encodings(job: Job, layout: InputLayout) -> dict[str, Encoding]:
    """Encodings of the artifact that the job goes on from: its model knows no other numbers.

    Raises:
        DataError: They do not fit the job's features.
    """
    if job.model.file is None:
        return {}
    signature = Path(job.model.file).with_name("signature.json")
    if not signature.exists():
        return {}
    earlier = {
        entry["name"]: read_encoding(entry["encoding"])
        for entry in json.loads(signature.read_text())["inputs"]
        if "encoding" in entry
    }
    for name, encoding in layout.encodings.items():
        known = earlier.get(name)
        if known is None or known.unlearned != encoding:
            raise DataError(
                f"data.features: {name!r} is read as {encoding.unlearned}, the model that the job "
                f"goes on from reads it as {known and known.unlearned}. Give the feature the "
                "settings of that model's job."
            )
    return {name: earlier[name] for name in layout.encodings}


def plan_data(job: Job, sources: dict[str, Source], layout: InputLayout) -> PlannedData:
    """Read all rows once (nulls, statistics) and fix the order of training.

    Raises:
        DataError: Values that the job does not allow.
    """
    scans = {role: scan(source, layout, job.data.on_null) for role, source in sources.items()}
    for role, found in scans.items():
        check_classes(job, layout, role, found)
    window_rows = job.data.window_rows or auto_window_rows(
        layout.row_bytes, job.data.virtual_shards
    )
    plan = Plan(
        block_rows=scans["train"].block_rows,
        global_batch_size=job.train.global_batch_size,
        virtual_shards=job.data.virtual_shards,
        window_rows=window_rows,
        shuffle=job.data.shuffle,
        seed=job.train.seed,
    )
    return PlannedData(layout, plan, sources, scans)


def check_output(job: Job, layout: InputLayout) -> None:
    """Whether the last layer fits label and loss, where the job file alone can tell.

    Raises ModelError.
    """
    loss = _loss_name(job)
    if loss in _CLASS_LOSSES and layout.label_dtype != "int64":
        raise ModelError(
            f"compile.loss={loss} needs a label of whole class numbers; {layout.label!r} holds "
            f"{layout.label_dtype}. Convert the label, or use a regression loss such as mse."
        )
    if layout.label_classes is not None and loss in _ELEMENTWISE_LOSSES - _BINARY_LOSSES:
        raise ModelError(
            f"compile.loss={loss} measures distances, the label {layout.label!r} is text, whose "
            "class numbers have none. Use sparse_categorical_crossentropy, or a label of numbers."
        )
    units = _output_units(job)
    if units is None:
        return
    gives_vector = _gives_vector(job, layout)
    if loss in _ELEMENTWISE_LOSSES and gives_vector and units != layout.label_size:
        raise ModelError(
            f"the last layer gives {units} outputs, the label {layout.label!r} has "
            f"{layout.label_size} value(s) a row; compile.loss={loss} compares them one by one. "
            f"Set the last layer's units to {layout.label_size}."
        )
    if loss in _ONE_HOT_LOSSES and gives_vector and layout.label_size != units:
        raise ModelError(
            f"compile.loss={loss} needs {units} values a row in the label {layout.label!r}; it has "
            f"{layout.label_size}. Use sparse_categorical_crossentropy for class numbers."
        )
    if loss in _CLASS_LOSSES and units < 2:
        raise ModelError(
            f"compile.loss={loss} needs an output for each class; the last layer has {units}. Set "
            "its units to the number of classes."
        )


def check_classes(job: Job, layout: InputLayout, role: str, found: Scan) -> None:
    """Whether class numbers lie within the model's outputs; TensorFlow would give NaN, not tell.

    Raises DataError.
    """
    units = _output_units(job)
    if _loss_name(job) not in _CLASS_LOSSES or units is None or _ignores_a_class(job):
        return
    lowest, highest = found.label_range
    if lowest < 0:
        raise DataError(
            f"data.{role}: label {layout.label!r} holds class {lowest}; class numbers count from "
            "0. Shift them."
        )
    if highest >= units:
        raise DataError(
            f"data.{role}: label {layout.label!r} holds class {highest}, the last layer has "
            f"outputs for 0 to {units - 1}. Set its units to {highest + 1} or more."
        )


def _loss_name(job: Job) -> str | None:
    if job.compile is None:
        return None
    return split_spec(job.compile.loss)[0].lower()


def _ignores_a_class(job: Job) -> bool:
    return job.compile is not None and "ignore_class" in split_spec(job.compile.loss)[1]


def _gives_vector(job: Job, layout: InputLayout) -> bool:
    """Whether the output of a row is one vector for certain: with more axes Keras compares others.

    Layers that are not known here are taken to keep the number of axes.
    """
    is_vector = len(layout.input_shape) == 1
    for spec in job.model.layers or []:
        name, arguments = split_spec(spec)
        if name == "Flatten" or name.startswith("Global"):
            is_vector = True
        elif name in ("LSTM", "GRU", "SimpleRNN"):
            is_vector = not arguments.get("return_sequences", False)
        elif name in ("Embedding", "Reshape", "RepeatVector") or is_own_code(name):
            is_vector = False
    return is_vector


def _output_units(job: Job) -> int | None:
    """Outputs of the last layer that changes their number, where it is a Dense; else None."""
    for spec in reversed(job.model.layers or []):
        name, arguments = split_spec(spec)
        if name in ("Activation", "Softmax", "ReLU", "Rescaling", "Dropout"):
            continue
        units: Any = arguments.get("units")
        return units if name == "Dense" and isinstance(units, int) else None
    return None


def _check_same_columns(sources: dict[str, Source]) -> None:
    train = sources["train"]
    for role, source in sources.items():
        for ours, theirs in zip(train.columns, source.columns, strict=True):
            if (ours.dtype, ours.is_list, ours.size) != (theirs.dtype, theirs.is_list, theirs.size):
                raise DataError(
                    f"column {ours.name!r} holds {ours.dtype} in data.train but {theirs.dtype} in "
                    f"data.{role}; one type is allowed. Convert {source.files[0].path}."
                )
