"""The signature: which columns a model takes, what it gives, and how it was judged in training.

Owns the reading of `signature.json`, the only thing that serving and training agree on beside the
model itself, and what takes its place for a model file that comes without one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import naming
from data_pipeline.encoding import Encoding, read_encoding
from data_pipeline.errors import DataError
from data_pipeline.features import InputLayout
from data_pipeline.tables import MAX_TABLE_ROWS, Wanted
from serving.errors import ModelFileError

SIGNATURE_FILE = "signature.json"

_TABLE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives.

    Attributes:
        layout: The input columns and their place in a row of the model's input. `label` is empty
            where nothing tells the label.
        output_shape: Shape of one row's prediction.
        compile: Loss and metrics as Keras serialises them, with the penalty on the weights, under
            the names `loss`, `loss_weights`, `metrics`, `weighted_metrics` and `weight_penalty`;
            None where nothing tells them.
        output_name: Name of the prediction.
    """

    layout: InputLayout
    output_shape: tuple[int, ...]
    compile: Mapping[str, Any] | None
    output_name: str = "prediction"

    @property
    def inputs(self) -> Wanted:
        """Each input column, in order: the shape of one row's numbers, or what is encoded."""
        return {
            column.name: column.shape if column.encoding is None else column.encoding.raw_dtype
            for column in self.layout.features
        }

    @property
    def output_size(self) -> int:
        """Numbers in one row's prediction."""
        return math.prod(self.output_shape)

    @property
    def table_rows(self) -> int:
        """Rows of a file to hold at a time: as many as take 64 MiB as input of the model."""
        return max(1, min(MAX_TABLE_ROWS, _TABLE_BYTES // (4 * self.layout.width)))


def read_signature(path: Path) -> Signature:
    """The signature in a `signature.json`.

    Raises:
        ModelFileError: It cannot be read, or is not one.
    """
    try:
        record = json.loads(path.read_text())
        label = record["label"]
        layout = InputLayout(
            features=naming.placed_columns([_column(entry) for entry in record["inputs"]]),
            label=label["name"],
            label_dtype=label["dtype"],
            label_size=math.prod(label["shape"][1:]),
            weight=record["weight"],
            label_classes=None if label.get("classes") is None else tuple(label["classes"]),
        )
        (output,) = record["outputs"]
        return Signature(
            layout, tuple(output["shape"][1:]), record.get("compile"), str(output["name"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"{path} is not a signature that `lockstep train` wrote ({type(error).__name__}: "
            f"{error}). Restore the file, or take the model out of this folder and name its "
            "columns with --features."
        ) from None


def name_columns(names: Sequence[str], input_shape: tuple[int, ...], model: str) -> InputLayout:
    """`data_pipeline.naming.name_columns`, for a model file.

    Raises:
        ModelFileError: No names were given, or their number does not fit.
    """
    try:
        return naming.name_columns(names, input_shape, model)
    except DataError as error:
        raise ModelFileError(str(error)) from None


def _column(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], Encoding | None]:
    """Name, shape of a number and encoding of an input in a `signature.json`."""
    record = entry.get("encoding")
    encoding = None if record is None else read_encoding(record)
    return entry["name"], tuple(entry["shape"][1:]), encoding
