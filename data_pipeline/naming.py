"""The columns of a model that came without a signature, as somebody names them.

Prediction and import share it, so that both name the columns of a file in the same way.
"""

import math
from collections.abc import Sequence

from data_pipeline.encoding import Encoding
from data_pipeline.errors import DataError
from data_pipeline.features import InputColumn, InputLayout


def name_columns(names: Sequence[str], input_shape: tuple[int, ...], model: str) -> InputLayout:
    """The layout of a model with one input and no signature, whose columns the caller names.

    One name stands for a column with the whole input, a list; else each name stands for one number
    of an input that is a vector.

    Raises:
        DataError: No names were given, or their number does not fit.
    """
    size = math.prod(input_shape)
    is_vector = len(input_shape) < 2
    choices = [f"{size} columns of numbers" if size > 1 else "a column of numbers"]
    choices = choices if is_vector else []
    if size > 1:
        choices.append(f"a column of lists of {size} numbers")
    allowed = " or ".join(choices)
    if not names:
        raise DataError(
            f"{model} comes without signature.json, so nothing tells which columns are its "
            f"input of shape {list(input_shape)}: {allowed}. Name them in order with --features "
            "a,b,c."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"--features names {twice[0]!r} more than once. Name each column once.")
    if len(names) == 1 and size > 1:
        return unlabelled_layout([(names[0], input_shape)])
    if not is_vector or len(names) != size:
        raise DataError(
            f"--features names {len(names)} columns; {model} takes {allowed}. Name as many."
        )
    return unlabelled_layout([(name, ()) for name in names])


def unlabelled_layout(columns: Sequence[tuple[str, tuple[int, ...]]]) -> InputLayout:
    """The layout of columns, given as name and shape, for a model whose label is not known."""
    placed = placed_columns([(name, shape, None) for name, shape in columns])
    return InputLayout(placed, "", "float32", 1, None)


def placed_columns(
    columns: Sequence[tuple[str, tuple[int, ...], Encoding | None]],
) -> tuple[InputColumn, ...]:
    """Columns, given as name, shape of a number and encoding, one after the other."""
    placed: list[InputColumn] = []
    for name, shape, encoding in columns:
        offset = placed[-1].offset + placed[-1].size if placed else 0
        shape = shape if encoding is None else encoding.shape
        placed.append(InputColumn(name, shape, offset, False, encoding))
    return tuple(placed)
