"""Where artifacts lie: folders of this machine, and prefixes of object stores.

A place is written once, under a name of its own, and holds nothing that anyone may see before
`commit`: a local folder gets its name then; on a store, which cannot rename, `manifest.json` comes
last, and without it there is no artifact. A version's row in the database comes later still.

Stores take address and credentials from the environment, by the names of `docs/registry.md`, the
same as for data.
"""

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

from pyarrow import fs

from configs.errors import did_you_mean
from registry.errors import ArtifactFailure, RegistryError

MANIFEST = "manifest.json"
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)(.*)", re.DOTALL)
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_REFUSED = re.compile(r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|PERMISSION|HTTP status 40[13]")


class Place(Protocol):
    """A folder that holds one artifact. File names are relative, with `/`.

    All methods raise ArtifactFailure where storage fails, and RegistryError where it refuses.
    """

    @property
    def name(self) -> str:
        """Absolute path or URI."""

    def write(self, file: str, chunks: Iterable[bytes]) -> None:
        """Write one file whole; `manifest.json` last."""

    def commit(self) -> None:
        """Everything is written: make it last, and seen under its name."""

    def read(self, file: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A file's bytes. Raises FileNotFoundError where there is none."""

    def files(self) -> set[str]:
        """Names of all files; empty where the place does not exist."""

    def remove(self) -> None:
        """Everything at this place goes, finished or not. Idempotent."""


def is_remote(place: str) -> bool:
    """Whether this is a URI of a store rather than a local path."""
    match = _URI.match(place)
    return match is not None and match[1] != "file"


def place_of(name: str) -> Place:
    """The place of this absolute path or URI; nothing is touched yet.

    Raises:
        RegistryError: A URI that is not understood.
    """
    if is_remote(name):
        return _Remote(name)
    return _Local(Path(name.removeprefix("file://")))


class _Local:
    """A folder; while it is written it has a hidden name beside its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._partial = folder.with_name(f".{folder.name}.partial")

    @property
    def name(self) -> str:
        return str(self._folder)

    def write(self, file: str, chunks: Iterable[bytes]) -> None:
        with self._failures():
            path = self._partial / file
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as out:
                for chunk in chunks:
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())

    def commit(self) -> None:
        with self._failures():
            for folder, _, _ in os.walk(self._partial):
                _sync_folder(folder)
            self._partial.rename(self._folder)
            _sync_folder(self._folder.parent)

    @contextlib.contextmanager
    def read(self, file: str) -> Iterator[IO[bytes]]:
        with self._failures(), open(self._folder / file, "rb") as stream:
            yield stream

    def files(self) -> set[str]:
        with self._failures():
            return {
                path.relative_to(self._folder).as_posix()
                for path in self._folder.rglob("*")
                if not path.is_dir()
            }

    def remove(self) -> None:
        with self._failures():
            for folder in (self._folder, self._partial):
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(folder)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ArtifactFailure(
                f"{self._folder}: storage failed: {error.strerror or error}. Check that the folder "
                "may be written to and that there is room, then try again."
            ) from error


class _Remote:
    """A prefix of a store."""

    def __init__(self, uri: str) -> None:
        self._uri = uri.rstrip("/")
        match = _URI.match(self._uri)
        scheme, authority, path = ("", "", "") if match is None else match.groups()
        _check_uri(scheme, authority, path)
        self._scheme, self._authority = scheme, authority
        self._path = path

    @property
    def name(self) -> str:
        return self._uri

    def write(self, file: str, chunks: Iterable[bytes]) -> None:
        with self._failures():
            system, root = self._connected()
            if self._scheme != "s3":  # there folders are no more than parts of names
                system.create_dir(f"{root}/{file}".rpartition("/")[0], recursive=True)
            with system.open_output_stream(f"{root}/{file}", compression=None) as out:
                for chunk in chunks:
                    out.write(chunk)

    def commit(self) -> None:
        """The manifest, written last, was it."""

    @contextlib.contextmanager
    def read(self, file: str) -> Iterator[IO[bytes]]:
        with self._failures():
            system, root = self._connected()
            with system.open_input_stream(f"{root}/{file}", compression=None) as stream:
                yield stream

    def files(self) -> set[str]:
        with self._failures():
            system, root = self._connected()
            found = system.get_file_info(
                fs.FileSelector(root, allow_not_found=True, recursive=True)
            )
            return {info.path.removeprefix(f"{root}/") for info in found if info.type != _DIRECTORY}

    def remove(self) -> None:
        with self._failures(), contextlib.suppress(FileNotFoundError):
            system, root = self._connected()
            system.delete_dir(root)

    def _connected(self) -> tuple[Any, str]:
        system, root = _connect(os.getpid(), self._scheme, self._authority, _environment())
        return system, root + self._path

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            text = _without_secrets(str(error).partition("\n")[0]).rstrip(". ")
            if _REFUSED.search(text) or isinstance(error, PermissionError):
                raise RegistryError(
                    f"{self._uri}: the store refuses access: {text}. Credentials that may read and "
                    "write it are needed; for s3:// check AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY in the environment."
                ) from None
            raise ArtifactFailure(
                f"{self._uri}: the store failed: {text}. Check the store and the way to it "
                "(AWS_ENDPOINT_URL_S3 and AWS_REGION for s3://), then try again."
            ) from None


_DIRECTORY = fs.FileType.Directory


def _check_uri(scheme: str, authority: str, path: str) -> None:
    if scheme not in SCHEMES:
        raise RegistryError(
            f"artifacts cannot lie at {scheme}://; local paths and "
            f"{', '.join(f'{known}://' for known in SCHEMES)} are allowed."
            f"{did_you_mean(scheme, SCHEMES)}"
        )
    if "@" in authority and scheme == "s3" or re.search(r"\?[\w.-]+=", authority + path):
        raise RegistryError(
            f"the place of artifacts begins with {scheme}:// and holds credentials or options; a "
            "bucket and a path are allowed. Put the rest into the environment."
        )


def _environment() -> tuple[str, ...]:
    """What a connection depends on, credentials by name alone."""
    given = os.environ.get
    return (
        given("AWS_ENDPOINT_URL_S3") or given("AWS_ENDPOINT_URL") or "",
        given("AWS_REGION") or given("AWS_DEFAULT_REGION") or "us-east-1",
        given("AWS_ACCESS_KEY_ID", ""),
        given("LOCKSTEP_STORAGE_ATTEMPTS") or "5",
        given("LOCKSTEP_STORAGE_TIMEOUT_S") or "10",
    )


@functools.lru_cache(maxsize=64)
def _connect(
    process: int, scheme: str, authority: str, environment: tuple[str, ...]
) -> tuple[Any, str]:
    """A client of one process, and what it calls the place of this authority."""
    if scheme != "s3":
        system, root = fs.FileSystem.from_uri(f"{scheme}://{authority}/")
        return system, root.rstrip("/")
    endpoint, region, _, attempts, timeout_s = environment
    parts = urlsplit(endpoint)
    place = {"scheme": parts.scheme, "endpoint_override": parts.netloc} if endpoint else {}
    system = fs.S3FileSystem(
        region=region,
        connect_timeout=float(timeout_s),
        request_timeout=float(timeout_s),
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=int(attempts)),
        **place,
    )
    return system, authority


def _without_secrets(text: str) -> str:
    text = re.sub(r"\?[^\s'\"]+", "", text)
    for name in _SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, "***")
    return text


def _sync_folder(folder: str | Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
