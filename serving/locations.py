"""Which files a user's job may touch: allowed locations, checked when submitted and when opened.

A location is a folder on disk or a URI of an object store, with all that is below it. What a user
names is taken apart here before any store or disk is asked: a scheme that is not one of ours, an
option that would send us to another endpoint, credentials in a URI, `..`, a link that leads out.
Disks are checked once more on the opened file itself, as a name may have come to mean another file
since.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.stores import SCHEMES, is_remote
from data_pipeline import storage
from serving.errors import BatchError, LocationError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_ODD = re.compile(r"[\x00-\x1f\x7f\\]")
_WILD = re.compile(r"[*?\[]")
_OPTIONS = re.compile(r"\?[\w.-]+=")
_LONGEST = 2_000


def check_location(name: str, allowed: Sequence[str]) -> str:
    """A file, folder or glob that a user named, in the one form that is used from here on.

    Args:
        name: What the user named: an absolute path, or a URI of an object store.
        allowed: Folders and URIs that the user's files may be in.

    Raises:
        LocationError: It is not in any of them, or is not understood. What is there, or is not, is
            not told.
    """
    found = _SCHEME.match(name)
    if not name or len(name) > _LONGEST or _ODD.search(name):
        raise LocationError(
            f"received a location of {len(name)} letters, with control letters or backslashes; a "
            f"path or URI of 1 to {_LONGEST} printed letters is allowed. Correct it."
        )
    if found and found[1].lower() not in SCHEMES:
        raise LocationError(
            f"received {_shown(name)}; {', '.join(s + '://' for s in SCHEMES)} and absolute paths "
            "are allowed. Name the file itself, without file: or http:."
        )
    if ".." in name.split("/"):
        raise _refused(name)
    return _checked_uri(name, allowed) if is_remote(name) else _checked_path(name, allowed)


def find_files(names: Sequence[str], allowed: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """The files of what a user named, each of them in an allowed location, links followed.

    Raises:
        LocationError: One is not, or there is nothing.
        DataError: A store refuses.
        ReadError: A store does not answer.
    """
    checked = [check_location(name, allowed) for name in names]
    files = storage.find("input", checked, suffixes)
    for file in files:
        check_location(file, allowed)
    return files


@contextmanager
def opened(
    path: str, allowed: Sequence[str] | None, planned: storage.FileState | None = None
) -> Iterator[Any]:
    """A file for reading; on disk it is the opened file, not its name, that is judged.

    Args:
        path: What `find_files` gave.
        allowed: The user's locations. None: the file is the service's own.
        planned: What the file has to be still.

    Raises:
        LocationError: The name leads out of the allowed locations now.
        BatchError: It is not the planned one any more.
        OSError: It cannot be opened.
        DataError: The store refuses.
        ReadError: The store does not answer.
    """
    if is_remote(path) or allowed is None:
        if allowed is not None:
            check_location(path, allowed)
        if planned is not None:
            _check_unchanged(file_state(path), planned)
        with storage.open_file(path) as file:
            yield file
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would have us wait for ever
    try:
        real = _path_of(descriptor, path)
        if not _is_below(real, [os.path.realpath(a) for a in allowed if not is_remote(a)]):
            raise _refused(path)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise LocationError(f"{_shown(path)} is no file. Name a file.")
        # By the descriptor, so that what is read is what was judged.
        with storage.open_file(f"/dev/fd/{descriptor}", None) as file:
            if planned is not None:
                now = os.fstat(descriptor)
                state = storage.FileState(path, now.st_size, now.st_mtime_ns)
                _check_unchanged(state, planned)
            yield file
    finally:
        os.close(descriptor)


def _checked_uri(name: str, allowed: Sequence[str]) -> str:
    scheme, _, rest = name.partition("://")
    authority, _, _ = rest.partition("/")
    if "@" in authority or _OPTIONS.search(name):
        raise LocationError(
            "received a URI with credentials or options; the plain URI of a file is allowed. The "
            "service has its own credentials."
        )
    parts = rest.rstrip("/").split("/")
    if _WILD.search(authority) or not authority or "" in parts or "." in parts:
        raise _refused(name)
    uri = f"{scheme.lower()}://{'/'.join(parts)}"
    fixed = _fixed_part(uri)
    roots = [root.rstrip("/") for root in allowed if is_remote(root)]
    if not _is_below(fixed, roots):
        raise _refused(name)
    return uri


def _checked_path(name: str, allowed: Sequence[str]) -> str:
    if not name.startswith("/"):
        raise LocationError(
            f"received {_shown(name)}; an absolute path or a URI is allowed. Name the whole path."
        )
    path = os.path.normpath(name)
    roots = [os.path.realpath(root) for root in allowed if not is_remote(root)]
    if not _is_below(os.path.realpath(_fixed_part(path)), roots):
        raise _refused(name)
    return path


def _fixed_part(path: str) -> str:
    """The path up to the folder in which a pattern begins."""
    parts = path.split("/")
    wild = next((i for i, part in enumerate(parts) if _WILD.search(part)), len(parts))
    return "/".join(parts[:wild])


def _is_below(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def _path_of(descriptor: int, path: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # not Linux: the name may be exchanged between the two looks, at worst
        return os.path.realpath(path)


def _check_unchanged(now: storage.FileState, planned: storage.FileState) -> None:
    if (now.size_bytes, now.modified_ns) != (planned.size_bytes, planned.modified_ns):
        raise BatchError(
            f"{planned.path} changed since the job was planned (size or time of change). Submit "
            "the job again.",
            "input_changed",
        )


def _refused(name: str) -> LocationError:
    return LocationError(
        f"{_shown(name)} is not in a location that you may use. Ask an administrator for the "
        "locations of your account, or upload the file."
    )


def _shown(name: str) -> str:
    return repr(name if len(name) <= 200 else name[:200] + "...")


def resolved_folder(name: str, allowed: Sequence[str]) -> str:
    """A folder to write to, in an allowed location, links followed as far as they are there."""
    checked = check_location(name, allowed)
    if _WILD.search(checked):
        raise LocationError(f"received {_shown(name)}; a folder without wildcards is allowed.")
    return checked if is_remote(checked) else os.path.realpath(checked)


def file_state(path: str) -> storage.FileState:
    """Size and time of change; of a local file those that an opened file has, links followed."""
    if is_remote(path):
        return storage.stat(path)
    found = Path(path).stat()
    return storage.FileState(path, found.st_size, found.st_mtime_ns)
