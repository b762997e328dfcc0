"""Files of users: uploads, kept whole until their time is over, and the outputs of jobs."""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline import storage
from serving import output_folder
from serving.account_types import Account
from serving.batch_plan import FORMATS
from serving.batch_store import BatchStore, new_id
from serving.batch_tables import StoredFile
from serving.batch_wire import DAY_S
from serving.errors import BatchError, QuotaExceeded
from serving.shard_leases import files_of

_LOG = logging.getLogger(__name__)
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class ServiceSettings:
    """Bounds of the service.

    Attributes:
        folder: Local folder or URI of what the service keeps; uploads are always local.
        outputs: Folders and URIs below which users may have outputs, `{user}` standing for the
            user's name; none by default.
        max_upload_bytes: Of one file.
        upload_expires_s: How long an upload is kept; the user may say less or more.
    """

    folder: str
    outputs: tuple[str, ...] = ()
    max_upload_bytes: int = 2 * 2**30
    upload_expires_s: float = 30.0 * DAY_S


class BatchFiles:
    """Files of users. Safe to share between threads.

    Args:
        store: Where they are kept.
        settings: Bounds.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        store: BatchStore,
        settings: ServiceSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self.settings, self._clock = store, settings, clock

    def upload(
        self,
        account: Account,
        name: str,
        blocks: Iterable[bytes],
        *,
        purpose: str = "batch",
        expires_after_s: float | None = None,
    ) -> StoredFile:
        """Keep a file of a user; it is there whole, or not at all.

        Args:
            account: Whose.
            name: What the user calls it; its end tells the format.
            blocks: The bytes.
            purpose: `batch` is allowed.
            expires_after_s: When it is removed.

        Raises:
            BatchError: The name or purpose is not allowed, or it is too large (413).
            QuotaExceeded: The user has too many bytes stored.
        """
        suffix = _checked_suffix(name, purpose)
        self.check_room(account, 0)
        most = account.quotas.bytes
        name_id, now = new_id("file"), self._clock()
        path = Path(self.settings.folder, "files", f"{name_id}{suffix}")
        size_bytes, digest = self._received(path, blocks)
        kept_s = self.settings.upload_expires_s if expires_after_s is None else expires_after_s
        file = StoredFile(
            id=name_id,
            user_name=account.user,
            purpose=purpose,
            name=os.path.basename(name),
            path=str(path),
            size_bytes=size_bytes,
            sha256=digest,
            job=None,
            created_at=now,
            expires_at=now + kept_s,
        )
        with contextlib.ExitStack() as undo:
            # Without room in the quota, or without a database, nobody would know the file.
            undo.callback(path.unlink, missing_ok=True)
            self._store.add_file(file, most)
            undo.pop_all()
        return file

    def check_room(self, account: Account, size_bytes: int) -> None:
        """Whether a user may store so many bytes more, as far as it is known before they come.

        Raises:
            QuotaExceeded: They may not.
        """
        most = account.quotas.bytes
        if most is None:
            return
        held = self._store.stored_bytes(account.user)
        if held >= most or held + size_bytes > most:
            raise QuotaExceeded(
                f"{held:,} bytes are stored; {most:,} are allowed. Delete files, or wait until "
                "they expire.",
                "bytes",
                3600.0,
            )

    def _received(self, path: Path, blocks: Iterable[bytes]) -> tuple[int, str]:
        """Write a file, whole or not at all; its size and SHA-256."""
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, size_bytes = hashlib.sha256(), 0
        with storage.new_file(str(path)) as out:
            for block in blocks:
                size_bytes += len(block)
                if size_bytes > self.settings.max_upload_bytes:
                    raise BatchError(
                        f"more than {self.settings.max_upload_bytes:,} bytes; fewer are allowed in "
                        "an upload. Give the URI of a file in a store instead.",
                        "file_too_large",
                        status=413,
                    )
                digest.update(block)
                out.write(block)
        return size_bytes, digest.hexdigest()

    def one(self, account: Account, name: str) -> StoredFile:
        """A file of the user's own. Raises BatchError (404) where there is none."""
        found = self._store.file(name) if name.startswith("file-") else None
        if found is None or not is_own(account, found.user_name):
            raise not_found("file", name)
        return found

    def page(
        self,
        account: Account,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> tuple[list[StoredFile], bool]:
        """Own files, newest first, and whether there are more."""
        if after is not None:
            self.one(account, after)
        if purpose not in (None, "batch", "batch_output"):
            return [], False
        found = self._store.files(account.user, purpose, after, limit + 1)
        return found[:limit], len(found) > limit

    def content(self, account: Account, name: str) -> Iterator[bytes]:
        """The bytes of a file; of an output, its parts one after the other."""
        file = self.one(account, name)
        if file.job is None:
            return blocks_of_file(file.path)
        job = self._store.job(file.job)
        if job is None:
            raise not_found("file", name)
        is_errors = name == job.error_file
        parts = [
            part.name
            for shard in self._store.shards(job.id, "done")
            for part in files_of(shard)
            if part.is_errors == is_errors
        ]
        return (block for part in parts for block in blocks_of_output(job.folder, part))

    def delete(self, account: Account, name: str) -> None:
        """Remove a file of the user's own. Jobs that still read it fail."""
        file = self.one(account, name)
        self._store.remove_file(file.id)
        if file.path:
            Path(file.path).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove files whose time is over; those that cannot be, another time."""
        for file in self._store.expired_files(self._clock()):
            try:
                if file.path:
                    Path(file.path).unlink(missing_ok=True)
            except OSError as error:
                _LOG.warning("%s cannot be removed: %s", file.id, error)
                continue
            self._store.remove_file(file.id)


def _checked_suffix(name: str, purpose: str) -> str:
    """The end of an upload's name, which tells its format."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in FORMATS or len(name) > 256 or not name.isprintable():
        raise BatchError(
            f"received a file called {name[:100]!r}; names of up to 256 letters that end with "
            f"{', '.join(FORMATS)} are allowed. Rename it.",
            "unknown_format",
            column="file",
        )
    if purpose != "batch":
        raise BatchError(
            f"received purpose {purpose[:50]!r}; batch is allowed.",
            "invalid_purpose",
            column="purpose",
        )
    return suffix


def is_own(account: Account, user: str) -> bool:
    """Whether an account may see what is a user's."""
    return account.role == "admin" or account.user == user


def not_found(kind: str, name: str) -> BatchError:
    """The same answer for what is not there and for what is somebody else's."""
    return BatchError(f"there is no {kind} {name[:100]!r}.", "not_found", status=404)


def blocks_of_file(path: str) -> Iterator[bytes]:
    """The bytes of a file or object, some at a time."""
    with storage.open_file(path) as file:
        while block := file.read(_BLOCK_BYTES):
            yield bytes(block)


def blocks_of_output(folder: str, name: str) -> Iterator[bytes]:
    """The bytes of a file of an output, some at a time. Raises as `output_folder.opened`."""
    with output_folder.opened(folder, name) as file:
        while block := file.read(_BLOCK_BYTES):
            yield bytes(block)
