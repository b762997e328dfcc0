"""A hash of a row that depends on the values of some of its columns alone.

The same in every run, on every machine, in any file and for any width of a number's type: what is
chosen by it stays chosen.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.encoding import is_text_type, moments_us

_NULL_BITS = np.uint64(0x9E3779B97F4A7C15)

Bits = NDArray[np.uint64]


def row_hashes(table: pa.Table, columns: Sequence[str]) -> Bits:
    """`(rows,)`: 64 bits a row that depend on the values of some columns alone."""
    hashes = np.zeros(table.num_rows, np.uint64)
    for name in columns:
        hashes = _mixed(hashes ^ _bits(table[name]))
    return hashes


def _bits(column: pa.ChunkedArray) -> Bits:
    """`(rows,)`: 64 bits for each value, the same for equal values of any width."""
    array = column.combine_chunks()
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        array = array.storage
        kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.cast(kind.value_type)
        kind = array.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return _number_bits(array, pa.int64(), np.int64)
    if pa.types.is_floating(kind):
        return _number_bits(array, pa.float64(), np.float64)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _number_bits(moments_us(pa.chunked_array([array])).combine_chunks(), None, np.int64)
    texts = array if is_text_type(kind) else pa.array([repr(v) for v in array.to_pylist()])
    words = texts.dictionary_encode()
    known = np.array(
        [
            int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
            for word in words.dictionary.to_pylist()
        ],
        np.uint64,
    )
    codes = pc.fill_null(words.indices, len(known)).to_numpy(zero_copy_only=False)
    bits: Bits = np.append(known, _NULL_BITS)[codes]
    return bits


def _number_bits(array: pa.Array, kind: pa.DataType | None, dtype: type[Any]) -> Bits:
    is_null = pc.is_null(array).to_numpy(zero_copy_only=False)
    whole = array if kind is None else array.cast(kind, safe=False)
    values = pc.fill_null(whole, 0).to_numpy(zero_copy_only=False).astype(dtype)
    values = values + dtype(0)  # -0.0 is 0.0
    bits = _mixed(np.ascontiguousarray(values).view(np.uint64))
    return np.where(is_null, _NULL_BITS, bits)


def _mixed(bits: Bits) -> Bits:
    """Splitmix64's finaliser (S. Vigna): every bit in changes about half of the bits out."""
    with np.errstate(over="ignore"):
        bits = bits + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return bits ^ (bits >> np.uint64(31))
