"""Small bodies that would become large, or deep, in the memory of whoever reads them."""

import struct
import subprocess
import sys

import pyarrow as pa

_LONG_LIST = """
import sys
import numpy, pyarrow, pyarrow.parquet
values = pyarrow.array(numpy.zeros({values}))
lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, len(values)], "int32"), values)
table = pyarrow.table({{"a": lists, "b": [1.0]}})
out = pyarrow.BufferOutputStream()
pyarrow.parquet.write_table(table, out, data_page_size=2**30)
sys.stdout.buffer.write(out.getvalue())
"""


def long_list_parquet(values: int) -> bytes:
    """One row with a list of many zeros in column `a`; made in another process, for its memory."""
    command = [sys.executable, "-c", _LONG_LIST.format(values=values)]
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


def nested_parquet(depth: int) -> bytes:
    """A file without rows, whose schema is so many groups one in another."""
    groups = [_element("schema", 1), *(_element("a", 1, 0) for _ in range(depth))]
    elements = [*groups, _element("x", None, 0, 4)]
    schema = b"\xfc" + _varint(len(elements)) + b"".join(elements)
    footer = b"\x15\x02\x19" + schema + b"\x16\x00\x19\x0c\x00"
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


def nested_arrow(depth: int) -> bytes:
    """A stream of one row, whose column `a` is lists in lists."""
    array = pa.array([1.0])
    for _ in range(depth):
        array = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), array)
    table = pa.table({"a": array, "b": [1.0]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _element(
    name: str, children: int | None, repetition: int | None = None, kind: int = -1
) -> bytes:
    """A SchemaElement of Parquet's footer, in Thrift's compact protocol."""
    fields = [(1, kind if kind >= 0 else None), (3, repetition), (4, name), (5, children)]
    out, last = b"", 0
    for number, value in fields:
        if value is None:
            continue
        if isinstance(value, str):
            out += bytes([(number - last) << 4 | 8]) + _varint(len(value)) + value.encode()
        else:
            out += bytes([(number - last) << 4 | 5]) + _varint(value << 1)
        last = number
    return out + b"\0"


def _varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])
