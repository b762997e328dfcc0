"""Files that are converted: their state, and how their bytes are reached.

The one place between the formats (`data_pipeline.formats`) and storage. Readers get file objects
of pyarrow's, decompressed where the name ends with .gz, and never open a path themselves.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs.schema import Paths
from data_pipeline.source import find_files


@dataclass(frozen=True)
class InputFile:
    """A file and the state it was found in.

    Attributes:
        path: Where it is.
        size_bytes: Its size, compressed where it is.
        modified_ns: Time of its last change.
    """

    path: str
    size_bytes: int
    modified_ns: int


def find_inputs(name: str, paths: Paths, suffixes: Sequence[str]) -> list[str]:
    """Files of a path, a folder (searched below for the suffixes), a glob, or a list of these.

    Raises:
        DataError: Nothing is found.
    """
    return find_files(name, paths, suffixes)


def stat_input(path: str) -> InputFile:
    """The state of a file.

    Raises OSError where there is none.
    """
    stat = Path(path).stat()
    return InputFile(path, stat.st_size, stat.st_mtime_ns)


def absolute(path: str) -> str:
    """The path as it is called from any working directory."""
    return str(Path(path).absolute())


def open_input(path: str) -> Any:
    """The bytes of a file as a `pyarrow.NativeFile`, from the start, decompressed.

    Raises OSError.
    """
    # Not mapped into memory: a file that shrinks while it is read would end the process.
    file = pa.OSFile(path)
    if not path.lower().endswith(".gz"):
        return file
    return pa.CompressedInputStream(file, "gzip")


def open_text(path: str) -> io.TextIOWrapper:
    """The text of a file in UTF-8, with its line ends as they are and without a byte order mark.

    Raises OSError.
    """
    return io.TextIOWrapper(open_input(path), encoding="utf-8-sig", newline="")


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A path on this machine with the file's bytes, for readers that open paths themselves."""
    yield path
