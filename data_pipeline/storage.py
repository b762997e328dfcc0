"""Files by name, wherever they are: local paths, and URIs of object stores.

Everywhere else a file is a string; here is what is behind it: finding, opening, and writing whole
or not at all. Connections are made at first use and belong to one process (a forked one makes its
own; fork before the first use all the same, as client libraries keep threads). What is in the files
is left to others; stores, their errors and retries to `data_pipeline.object_stores`.

Stores are told where they are, and who asks, by the environment alone:

    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN   who asks, for s3://
    AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL     a store other than Amazon's: http://host:port
    AWS_REGION or AWS_DEFAULT_REGION            where the buckets are; without it, us-east-1
    LOCKSTEP_STORAGE_ATTEMPTS                   tries of a request (1 to 20; 5)
    LOCKSTEP_STORAGE_TIMEOUT_S                  silent seconds that end a try (1 to 600; 10)

gs://, abfs:// and hdfs:// take theirs as their own client libraries do.
"""

import contextlib
import errno
import fnmatch
import functools
import glob
import io
import os
import posixpath
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
from pyarrow import fs

from configs.errors import did_you_mean
from configs.section import Paths
from configs.stores import is_remote, whereabouts
from data_pipeline.errors import DataError, ReadError
from data_pipeline.object_stores import Store, failures_of, store_of

_HERE = "the working directory"
_THREADS = 16
_COPY_BYTES = 8 * 2**20
_GLOB_LETTERS = frozenset("*?[")


@dataclass(frozen=True)
class FileState:
    """What tells a file from a later one of the same name."""

    path: str
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Entry:
    """What a folder lists: a file with its size, or a folder."""

    name: str
    size_bytes: int
    is_file: bool


def absolute(path: str) -> str:
    """The path as any working directory understands it; URIs are so already."""
    return path if is_remote(path) else str(Path(path).absolute())


def find(name: str, paths: Paths, suffixes: Sequence[str]) -> list[str]:
    """Files of a path, a folder (searched below), a glob, or a list of these.

    The files of a folder or glob are sorted; `**` stands for any number of folders.

    Args:
        name: What the error messages call the paths.
        paths: What to look for. Files that are named are taken as they are.
        suffixes: What counts in folders. Names with a leading dot or underscore never do, nor what
            is in folders with such names: unfinished outputs are called so.

    Raises:
        DataError: Nothing is found, or a store refuses.
        ReadError: A store does not answer.
    """
    entries = [paths] if isinstance(paths, str) else list(paths)
    if not entries:
        raise DataError(f"{name} is an empty list; name at least one file.")
    expand = functools.partial(_expand, name, suffixes)
    with ThreadPoolExecutor(min(_THREADS, len(entries))) as threads:
        found = threads.map(expand, entries)
        return list(dict.fromkeys(path for files in found for path in files))


def stat(path: str) -> FileState:
    """Size and time of change of a file; one request to a store.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: The store refuses.
        ReadError: The store does not answer.
    """
    if not is_remote(path):
        found = os.stat(path)
        return FileState(path, found.st_size, found.st_mtime_ns)
    store = store_of(path)
    with failures_of(path):
        info = store.system.get_file_info(store.inner(path))
    if info.type != fs.FileType.File:
        raise FileNotFoundError(errno.ENOENT, "the store has no such object", path)
    return FileState(path, info.size, info.mtime_ns)


def exists(path: str) -> bool:
    """Whether there is a file of this name. Raises as `stat`, but for a missing file."""
    try:
        stat(path)
    except FileNotFoundError:
        return False
    return True


def list_folder(path: str) -> list[Entry]:
    """What is in one folder, sorted by name, hidden names too; nothing if there is no such folder.

    One listing. Raises as `new_file`.
    """
    if is_remote(path):
        store = store_of(path)
        selector = fs.FileSelector(store.inner(path), allow_not_found=True)
        with failures_of(path):
            found = store.system.get_file_info(selector)
        entries = [Entry(info.base_name, info.size or 0, info.is_file) for info in found]
    else:
        entries = []
        with contextlib.suppress(FileNotFoundError), os.scandir(path) as listed:
            for item in listed:
                with contextlib.suppress(FileNotFoundError):  # removed since, or a broken link
                    entries.append(Entry(item.name, item.stat().st_size, item.is_file()))
    return sorted(entries, key=lambda entry: entry.name)


def read_whole(path: str) -> bytes:
    """All bytes of a file, read once.

    Raises:
        OSError: A local file cannot be read, or there is no such file.
        DataError: The store refuses.
        ReadError: The store does not answer.
    """
    if not is_remote(path):
        return Path(path).read_bytes()
    with open_file(path) as file, failures_of(path):
        return bytes(file.read())


def open_file(path: str, planned: FileState | None = None) -> pa.NativeFile:
    """A file for reading at any place; not to be shared between threads.

    What fails later, while reading, is an OSError for `configs.stores.reason` to explain.

    Args:
        path: The file.
        planned: What `stat` said when the run was planned; looked at once, before opening.

    Raises:
        OSError: A local file cannot be opened.
        DataError: The store refuses.
        ReadError: The store does not answer, or the file is not the planned one any more.
    """
    if planned is not None:
        now = stat(path)
        if (now.size_bytes, now.modified_ns) != (planned.size_bytes, planned.modified_ns):
            raise ReadError(
                f"{path} changed since the run was planned (size or time of change). Start a new "
                "run."
            )
    if not is_remote(path):
        return pa.OSFile(path)
    store = store_of(path)
    with failures_of(path):
        return store.system.open_input_file(store.inner(path))


@contextlib.contextmanager
def new_file(path: str) -> Iterator[IO[bytes]]:
    """A stream whose bytes appear at `path`, whole, when the block ends without an error.

    Else nothing appears, and what was there stays. An object is collected in memory and then put
    at once; a local file is synced before it gets its name. Its folder must exist.

    Raises:
        OSError: The local disk fails.
        DataError: The store refuses.
        ReadError: The store does not answer.
    """
    if is_remote(path):
        whole = io.BytesIO()
        yield whole
        write_whole(path, whole.getbuffer())
        return
    target = Path(path)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    sync(target.parent)


def write_whole(path: str, *pieces: bytes | memoryview) -> None:
    """Write a file, whole or not at all, of pieces that follow each other; see `new_file`.

    Nothing is copied on the way: pieces may be large.
    """
    if not is_remote(path):
        with new_file(path) as file:
            file.writelines(pieces)
        return
    store = store_of(path)
    # A stream that is closed is an object, however much was written: so nothing but the store may
    # fail between opening and closing.
    with (
        failures_of(path),
        store.system.open_output_stream(store.inner(path), compression=None) as out,
    ):
        for piece in pieces:
            out.write(piece)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path with a file's bytes while the block lasts, for what reads paths only.

    Raises as `open_file`.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=posixpath.splitext(path)[1]) as copy:
        with open_file(path) as file, failures_of(path):
            while data := file.read(_COPY_BYTES):
                copy.write(data)
        copy.flush()
        yield copy.name


def make_folder(path: str) -> None:
    """Make a folder and those above it; a store needs none. Safe to repeat."""
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)


def remove(path: str) -> None:
    """Remove a file; that there is none is fine. Raises as `new_file`."""
    if not is_remote(path):
        Path(path).unlink(missing_ok=True)
        return
    store = store_of(path)
    with contextlib.suppress(FileNotFoundError), failures_of(path):
        store.system.delete_file(store.inner(path))


def sync(path: Path) -> None:
    """Have a local file, or the names in a local folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _expand(name: str, suffixes: Sequence[str], entry: str) -> list[str]:
    if is_remote(entry):
        bare = entry.rstrip("/")
        return _expand_remote(name, suffixes, bare if is_remote(bare) else entry)
    entry = entry.removeprefix("file://")
    if not _GLOB_LETTERS.isdisjoint(entry):
        matches = sorted(path for path in glob.glob(entry, recursive=True) if Path(path).is_file())
        if not matches:
            raise DataError(
                f"{name}: {entry!r} matches no file. Check the pattern; it is relative to {_HERE}."
            )
        return matches
    path = Path(entry)
    if path.is_dir():
        matches = sorted(_files_below(path, suffixes))
        if not matches:
            raise _empty_folder(name, entry, suffixes)
        return matches
    if not path.exists():
        names = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(
            f"{name}: no file or folder at {entry!r} (relative to {_HERE})."
            f"{did_you_mean(path.name, names)} Check the path; `lockstep example flights` writes "
            "the data of the examples."
        )
    return [entry]


def _files_below(folder: Path, suffixes: Sequence[str]) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [other for other in folders if not _is_hidden(other)]
        for file in files:
            if _counts(file, suffixes):
                yield str(Path(parent, file))


def _expand_remote(name: str, suffixes: Sequence[str], entry: str) -> list[str]:
    store = store_of(entry)
    inner = store.inner(entry)
    with failures_of(entry):
        if not _GLOB_LETTERS.isdisjoint(inner):
            matches = sorted(store.uri(path) for path in _match(store.system, inner))
            if not matches:
                _check_bucket(name, entry, store)
                raise DataError(f"{name}: {entry!r} matches no object. Check the pattern.")
            return matches
        kind = store.system.get_file_info(inner).type
        if kind == fs.FileType.File:
            return [entry]
        if kind == fs.FileType.NotFound:
            _check_bucket(name, entry, store)
            raise DataError(
                f"{name}: no object or folder at {entry!r}. Check the path; names of objects are "
                "compared letter by letter."
            )
        found = store.system.get_file_info(fs.FileSelector(inner, recursive=True))
    start = len(inner) + 1
    matches = sorted(
        store.uri(info.path)
        for info in found
        if info.is_file
        and _counts(info.base_name, suffixes)
        and not any(map(_is_hidden, info.path[start:].split("/")))
    )
    if not matches:
        raise _empty_folder(name, entry, suffixes)
    return matches


def _match(system: fs.FileSystem, pattern: str) -> list[str]:
    """Files that a pattern matches, by the rules of Python's `glob`.

    Everything below the last folder without a wildcard is listed, one level where one will do.
    """
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if not _GLOB_LETTERS.isdisjoint(part))
    base, wanted = "/".join(parts[:first]), parts[first:]
    is_deep = len(wanted) > 1 or wanted == ["**"]
    found = system.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=is_deep))
    start = len(base) + 1 if base else 0
    files = [info.path for info in found if info.is_file]
    return [path for path in files if matches_glob(path[start:].split("/"), wanted)]


def matches_glob(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a pattern, both cut into names; wildcards pass over leading dots."""
    if not pattern:
        return not parts
    wanted, rest = pattern[0], pattern[1:]
    if wanted == "**":
        visible = next((i for i, name in enumerate(parts) if name[:1] == "."), len(parts))
        return any(matches_glob(parts[skipped:], rest) for skipped in range(visible + 1))
    if not parts or (parts[0].startswith(".") and not wanted.startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], wanted) and matches_glob(parts[1:], rest)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _counts(name: str, suffixes: Sequence[str]) -> bool:
    return not _is_hidden(name) and posixpath.splitext(name)[1].lower() in suffixes


def _empty_folder(name: str, entry: str, suffixes: Sequence[str]) -> DataError:
    allowed = ", ".join(f"*{suffix}" for suffix in suffixes)
    return DataError(
        f"{name}: folder {entry!r} holds no data file ({allowed}). Name the folder that does."
    )


def _check_bucket(name: str, entry: str, store: Store) -> None:
    """Raise DataError if the bucket itself is missing: another mistake than a wrong name in it."""
    if store.root and store.system.get_file_info(store.root).type == fs.FileType.NotFound:
        place = whereabouts(entry.partition("://")[0])
        raise DataError(
            f"{name}: no bucket {store.root!r} at {place}; {entry!r} names it. Check its name, and "
            "the endpoint and region in the environment."
        )
