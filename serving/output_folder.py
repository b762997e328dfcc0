"""The folder of an output: files in it by name, on a disk that its user may change meanwhile.

Where a user may have outputs the user may also put links, and exchange a folder for one between two
of our looks. So nothing here goes by a whole path: folders are opened one in the other without
following links, and files are made, named, read and removed within the folder that was opened. An
output's folder is recorded without links (`locations.resolved_folder`), so one in it is no mistake
of ours. Object stores have no links: there it is `data_pipeline.storage`.
"""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from configs.stores import is_remote
from data_pipeline import storage
from data_pipeline.object_stores import failures_of, store_of
from serving.errors import LocationError

_STEP = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe would have us wait for ever


def make_folder(folder: str, name: str) -> None:
    """Make a folder below an output's, and those above it. Idempotent.

    Raises:
        LocationError: There is a link, or a file.
        OSError: The disk fails.
    """
    if not is_remote(folder):
        with _inside(folder, name, makes=True):
            pass


def new_file(folder: str, name: str) -> IO[bytes]:
    """A new local file for writing, unbuffered; what had its name is gone. Raises as others."""
    parent, _, last = name.rpartition("/")
    with _inside(folder, parent, makes=True) as descriptor:
        _unlink(descriptor, last)
        return os.fdopen(os.open(last, _NEW, 0o666, dir_fd=descriptor), "wb", buffering=0)


def write_whole(folder: str, name: str, data: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        LocationError: There is a link where a folder was.
        OSError: The disk fails.
        DataError: The store refuses.
        ReadError: The store does not answer.
    """
    if is_remote(folder):
        storage.write_whole(f"{folder}/{name}", data)
        return
    parent, _, last = name.rpartition("/")
    partial = f".{last}.{secrets.token_hex(4)}.partial"
    with _inside(folder, parent) as descriptor:
        try:
            with os.fdopen(os.open(partial, _NEW, 0o666, dir_fd=descriptor), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, last, src_dir_fd=descriptor, dst_dir_fd=descriptor)
        finally:
            _unlink(descriptor, partial)
        os.fsync(descriptor)


def rename(folder: str, source: str, target: str) -> None:
    """Give a file another name, whole and at once; what had that name is gone.

    In a store the object is copied by the store itself, since stores know no renaming.

    Raises:
        FileNotFoundError: There is no such file.
        LocationError, OSError, DataError, ReadError: As `write_whole`.
    """
    if is_remote(folder):
        store = store_of(folder)
        with failures_of(folder):
            store.system.copy_file(
                store.inner(f"{folder}/{source}"), store.inner(f"{folder}/{target}")
            )
        return
    (before, _, old), (after, _, new) = source.rpartition("/"), target.rpartition("/")
    with _inside(folder, before) as there, _inside(folder, after) as here:
        os.replace(old, new, src_dir_fd=there, dst_dir_fd=here)
        os.fsync(here)


@contextmanager
def opened(folder: str, name: str) -> Iterator[IO[bytes]]:
    """A file for reading.

    Raises:
        FileNotFoundError: There is no such file.
        LocationError: It is a link or no file.
        OSError, DataError, ReadError: As `write_whole`.
    """
    if is_remote(folder):
        with storage.open_file(f"{folder}/{name}") as remote:
            yield remote
        return
    parent, _, last = name.rpartition("/")
    with _inside(folder, parent) as descriptor, _refusing_links(f"{folder}/{name}"):
        found = os.open(last, _READ, dir_fd=descriptor)
    with os.fdopen(found, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise LocationError(f"{folder}/{name} is no file any more. Submit the job again.")
        yield file


def list_folder(folder: str, name: str) -> list[storage.Entry]:
    """Files in a folder below an output's, by name; none if there is no such folder.

    Raises as `write_whole`.
    """
    if is_remote(folder):
        return [e for e in storage.list_folder(f"{folder}/{name}") if e.is_file]
    entries = []
    with suppress(FileNotFoundError), _inside(folder, name) as descriptor:
        for last in sorted(os.listdir(descriptor)):
            with suppress(FileNotFoundError):  # removed since
                found = os.stat(last, dir_fd=descriptor, follow_symlinks=False)
                if stat.S_ISREG(found.st_mode):
                    entries.append(storage.Entry(last, found.st_size, True))
    return entries


def remove(folder: str, name: str) -> None:
    """Remove a file; that there is none is fine. Raises as `write_whole`."""
    if is_remote(folder):
        storage.remove(f"{folder}/{name}")
        return
    parent, _, last = name.rpartition("/")
    with suppress(FileNotFoundError), _inside(folder, parent) as descriptor:
        _unlink(descriptor, last)


def remove_empty(folder: str, name: str) -> None:
    """Remove a folder below an output's if nothing is in it. Never raises."""
    if is_remote(folder):
        return
    parent, _, last = name.rpartition("/")
    with suppress(OSError, LocationError), _inside(folder, parent) as descriptor:
        os.rmdir(last, dir_fd=descriptor)


def remove_tree(folder: str) -> None:
    """Remove a local folder with all in it; links in it, not what they lead to. Idempotent.

    Raises:
        LocationError: A link leads to it.
        OSError: Something in it cannot be removed.
    """
    parent, _, last = folder.rstrip("/").rpartition("/")
    with suppress(FileNotFoundError), _inside(parent or "/", "") as descriptor:
        shutil.rmtree(last, dir_fd=descriptor)


@contextmanager
def _inside(folder: str, below: str, makes: bool = False) -> Iterator[int]:
    """A descriptor of a local folder to which no link leads."""
    steps = [step for step in [*folder.split("/"), *below.split("/")] if step]
    descriptor = os.open("/", _STEP if steps else _FOLDER)
    try:
        for number, step in enumerate(steps, 1):
            kind = _FOLDER if number == len(steps) else _STEP
            with _refusing_links("/" + "/".join(steps[:number])):
                try:
                    inner = os.open(step, kind, dir_fd=descriptor)
                except FileNotFoundError:
                    if not makes:
                        raise
                    with suppress(FileExistsError):  # made by another meanwhile
                        os.mkdir(step, dir_fd=descriptor)
                    inner = os.open(step, kind, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _refusing_links(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK):
            raise
        raise LocationError(
            f"{path} is a link, or no folder any more; an output is kept in folders and files of "
            "its own. Remove it, then submit the job again."
        ) from error


def _unlink(descriptor: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=descriptor)
