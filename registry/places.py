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
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from pyarrow import fs

from configs.stores import (
    S3Options,
    StoreFailure,
    StoreMistake,
    explained,
    is_remote,
    parse_uri,
)
from registry.errors import ArtifactFailure, RegistryError

MANIFEST = "manifest.json"


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
            for above in (self._folder.parent, self._folder.parent.parent):  # both may be new
                _sync_folder(above)

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
        with _as_errors_of_registry():
            self._scheme, self._authority, self._path = parse_uri(self._uri)

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
            return {info.path.removeprefix(f"{root}/") for info in found if info.is_file}

    def remove(self) -> None:
        with self._failures(), contextlib.suppress(FileNotFoundError):
            system, root = self._connected()
            system.delete_dir(root)

    def _connected(self) -> tuple[Any, str]:
        options = S3Options.from_environment()
        system, root = _connect(os.getpid(), self._scheme, self._authority, options)
        return system, root + self._path

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        begin = time.monotonic()
        with _as_errors_of_registry():
            try:
                yield
            except FileNotFoundError:
                raise
            except OSError as error:
                raise explained(self._uri, error, time.monotonic() - begin) from None


@contextlib.contextmanager
def _as_errors_of_registry() -> Iterator[None]:
    try:
        yield
    except StoreMistake as error:
        raise RegistryError(str(error)) from None
    except StoreFailure as error:
        raise ArtifactFailure(str(error)) from None


@functools.lru_cache(maxsize=64)
def _connect(process: int, scheme: str, authority: str, options: S3Options) -> tuple[Any, str]:
    """A client of one process, and what it calls the place of this authority."""
    if scheme == "s3":
        system = fs.S3FileSystem(
            region=options.region,
            connect_timeout=options.limits.timeout_s,
            request_timeout=options.limits.timeout_s,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=options.limits.attempts),
            **options.address(),
        )
        return system, authority
    limit = ""
    if scheme in ("gs", "gcs"):  # its own patience is a quarter of an hour
        limit = f"?retry_limit_seconds={options.limits.attempts * options.limits.timeout_s:g}"
    system, root = fs.FileSystem.from_uri(f"{scheme}://{authority}/{limit}")
    return system, root.rstrip("/")


def _sync_folder(folder: str | Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
