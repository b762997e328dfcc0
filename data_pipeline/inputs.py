"""Bytes of files that are converted, decompressed where the name ends with .gz.

The one place between the formats (`data_pipeline.formats`) and storage. Readers get file objects
of pyarrow's and never open a path themselves.
"""

import io
from typing import Any

import pyarrow as pa

from data_pipeline import storage


def open_input(path: str) -> Any:
    """The bytes of a file as a `pyarrow.NativeFile`, from the start, decompressed.

    Raises:
        What `storage.open_file` raises.
    """
    # Not mapped into memory: a file that shrinks while it is read would end the process.
    file = storage.open_file(path)
    if not path.lower().endswith(".gz"):
        return file
    return pa.CompressedInputStream(file, "gzip")


def open_text(path: str) -> io.TextIOWrapper:
    """The text of a file in UTF-8, with its line ends as they are and without a byte order mark.

    Raises:
        What `storage.open_file` raises.
    """
    return io.TextIOWrapper(open_input(path), encoding="utf-8-sig", newline="")
