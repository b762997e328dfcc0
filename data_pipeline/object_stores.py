"""Connections to object stores, for data.

A *store* is what a URI names in front of the path: `s3://bucket`, `hdfs://host:port`. Where it is
and who asks comes from the environment (see `data_pipeline.storage`, which is how the rest of the
package comes here); what URIs, environment and failures mean is `configs.stores`'. Requests are
tried again a bounded number of times, each for a bounded time.
"""

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pyarrow import fs

from configs.stores import (
    S3Options,
    StoreFailure,
    StoreMistake,
    explained,
    is_of_store,
    is_remote,
    parse_uri,
)
from data_pipeline.errors import DataError, ReadError


@dataclass(frozen=True)
class Store:
    """One store, connected.

    Attributes:
        system: What speaks to it; safe to share between threads, not with a forked process.
        prefix: The URI up to the path, such as `s3://bucket`.
        root: What `system` calls this place, such as `bucket`.
    """

    system: fs.FileSystem
    prefix: str
    root: str

    def inner(self, uri: str) -> str:
        """What `system` calls the file or folder of a URI."""
        return self.root + uri.removeprefix(self.prefix)

    def uri(self, inner: str) -> str:
        """The URI of what `system` calls `inner`."""
        return self.prefix + inner.removeprefix(self.root)


def store_of(uri: str) -> Store:
    """The store that holds a URI; connected once a process and environment.

    Nothing is asked of the store yet.

    Raises:
        DataError: A URI that is not understood, or that holds what belongs into the environment.
    """
    with _as_errors_of_data():
        scheme, authority, _ = parse_uri(uri)
        return _connect(os.getpid(), scheme, authority, S3Options.from_environment())


@contextlib.contextmanager
def failures_of(path: str, is_reading: bool = False) -> Iterator[None]:
    """Errors of the store inside the block as what they mean.

    A missing file stays what it is, and so does any error at a local path.

    Args:
        path: What is worked on.
        is_reading: Whether bytes are made sense of inside the block; then errors that no store
            signed are left alone.

    Raises:
        DataError: The store refuses, or there is no such bucket.
        ReadError: The store does not answer.
    """
    begin = time.monotonic()
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if not is_remote(path) or (is_reading and not is_of_store(error)):
            raise
        with _as_errors_of_data():
            raise explained(path, error, time.monotonic() - begin) from None


@functools.lru_cache(maxsize=64)
def _connect(process: int, scheme: str, authority: str, options: S3Options) -> Store:
    """Connections of one process: what a fork inherits carries the parent's number."""
    prefix = f"{scheme}://{authority}"
    with failures_of(prefix):
        if scheme == "s3":
            return Store(_s3(options), prefix, authority)
        limit = ""
        if scheme in ("gs", "gcs"):  # its own patience is a quarter of an hour
            seconds = options.limits.attempts * options.limits.timeout_s
            limit = f"?retry_limit_seconds={seconds:g}"
        system, root = fs.FileSystem.from_uri(f"{prefix}/{limit}")
    root = root.rstrip("/")
    if not root and scheme.startswith("abfs"):  # an account; its containers begin without a slash
        return Store(system, f"{prefix}/", root)
    return Store(system, prefix, root)


def _s3(options: S3Options) -> fs.FileSystem:
    """A client; without an endpoint of its own, of Amazon's."""
    return fs.S3FileSystem(
        region=options.region,
        connect_timeout=options.limits.timeout_s,
        # Under curl, the time for which fewer bytes than one a second end a try.
        request_timeout=options.limits.timeout_s,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=options.limits.attempts),
        **options.address(),
    )


@contextlib.contextmanager
def _as_errors_of_data() -> Iterator[None]:
    try:
        yield
    except StoreMistake as error:
        raise DataError(str(error)) from None
    except StoreFailure as error:
        raise ReadError(str(error)) from None
