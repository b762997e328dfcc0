"""Which format files are of: told by their suffixes, or by `data.format`.

In folders only what has a known suffix counts; files that are named, also by a glob, are taken as
the job says.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from configs.data import DataConfig
from configs.section import Paths
from data_pipeline.errors import DataError
from data_pipeline.source import PARQUET_SUFFIXES
from data_pipeline.storage import find

PARQUET = "parquet"


@dataclass(frozen=True)
class Format:
    """How the files of a format are called, and who reads them.

    Attributes:
        suffixes: What names end with.
        module: Has the entry `open_files`.
        passes: How often all bytes are read.
        has_gzip: Whether files may be compressed as a whole, named .gz after the suffix.
    """

    suffixes: tuple[str, ...]
    module: str
    passes: int = 1
    has_gzip: bool = False


FORMATS = {
    "csv": Format((".csv",), "data_pipeline.formats.csv_files", 2, True),
    "ndjson": Format((".ndjson", ".jsonl"), "data_pipeline.formats.ndjson", 2, True),
    "arrow": Format((".arrow", ".feather", ".ipc"), "data_pipeline.formats.arrow_files"),
    "tfrecord": Format((".tfrecord", ".tfrecords"), "data_pipeline.formats.tfrecords", 2, True),
    "numpy": Format((".npy", ".npz"), "data_pipeline.formats.numpy_files"),
    "images": Format((".png", ".jpg", ".jpeg", ".bmp", ".gif"), "data_pipeline.formats.images"),
}

_KIND_OF_SUFFIX = {
    **dict.fromkeys(PARQUET_SUFFIXES, PARQUET),
    **{suffix: kind for kind, each in FORMATS.items() for suffix in each.suffixes},
}
_ALLOWED = ", ".join(_KIND_OF_SUFFIX)
_SHARD_NUMBER = re.compile(r"-\d+-of-\d+(?=\.gz$|$)")


def find_of_one_kind(name: str, paths: Paths, data: DataConfig) -> tuple[str, list[str]]:
    """The format of a role's files, and the files in order; of Parquet none where it is stated.

    Raises:
        DataError: Nothing is found, or files of several formats.
    """
    stated = "images" if data.format == "auto" and data.images is not None else data.format
    if data.images is not None and stated != "images":
        raise DataError(
            f"data.images has no effect with data.format: {stated}. Remove it, or set data.format: "
            "images."
        )
    if stated == PARQUET:
        return stated, []
    by_kind: dict[str, dict[str, None]] = {}
    for entry in [paths] if isinstance(paths, str) else paths:
        for kind, path in _found(name, entry, stated):
            by_kind.setdefault(kind, {})[path] = None
    if not by_kind:
        raise DataError(
            f"{name}: {paths!r} holds no data file; {_ALLOWED} are allowed. Name the files, or set "
            "data.format."
        )
    if len(by_kind) > 1:
        examples = [f"{kind} ({next(iter(files))})" for kind, files in by_kind.items()]
        raise DataError(
            f"{name} holds files of several formats: {', '.join(examples)}; one is allowed. Set "
            "data.format to the one that counts, or name its files."
        )
    ((kind, files),) = by_kind.items()
    if kind == "images" and data.images is None:
        raise DataError(
            f"{name} holds images, such as {next(iter(files))}; data.images must say their size. "
            "Set data.images: {height: 64, width: 64}."
        )
    return kind, list(files)


def _found(name: str, entry: str, stated: str) -> Iterator[tuple[str, str]]:
    """Format and path of what one entry names."""
    suffixes = [suffix for suffix, kind in _KIND_OF_SUFFIX.items() if stated in ("auto", kind)]
    if stated == "auto" or FORMATS[stated].has_gzip:
        suffixes.append(".gz")
    paths = find(name, entry, suffixes)
    is_folder = paths != [entry] and not any(letter in entry for letter in "*?[")
    for path in paths:
        kind = kind_of_name(path)
        if not is_folder and stated != "auto":
            yield stated, path
        elif kind is not None and stated in ("auto", kind):
            yield kind, path
        elif not is_folder:
            raise DataError(
                f"{name}: the name of {path} says no format; {_ALLOWED} are allowed. Set "
                "data.format, or leave the file out."
            )


def kind_of_name(path: str) -> str | None:
    """The format that a file's name says; a shard's number may follow the suffix."""
    name = _SHARD_NUMBER.sub("", path.lower())
    plain = name.removesuffix(".gz")
    kind = _KIND_OF_SUFFIX.get(os.path.splitext(plain)[1])
    if plain != name and (kind is None or kind == PARQUET or not FORMATS[kind].has_gzip):
        return None
    return kind
