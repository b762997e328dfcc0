"""A run's checkpoints at one place, local or on a store: whole or not at all, the newest found.

A checkpoint is two files. The .h5 is written first, then its manifest; each appears whole or not
at all, so a checkpoint exists if and only if its manifest does and the .h5 fits it. What a dead
writer leaves is a .h5 without a manifest, which no reader takes.

File names carry step and generation: two generations never write the same file. Which checkpoint
is the newest is decided by generation first, then step, because a new generation may go on from
an earlier step, and what it writes supersedes all before.

An object belongs to one writer at a time. Reading (`newest`, `final`, `has_any`) may go on
elsewhere meanwhile. No TensorFlow.
"""

import contextlib
import errno
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from configs.stores import is_remote
from data_pipeline import storage
from data_pipeline.errors import DataError, ReadError
from trainer.checkpoint import PackedCheckpoint, pack
from trainer.checkpoint_folder import (
    ChangedError,
    DamagedError,
    Slot,
    list_slots,
    read_data,
    read_manifest,
)
from trainer.checkpoint_manifest import (
    FINAL,
    CheckpointName,
    Manifest,
    checkpoint_name,
    package_versions,
    parse_name,
)
from trainer.errors import CheckpointError
from trainer.metric_names import is_more_better
from trainer.payloads import Arrays

_PARTIAL = re.compile(r"\.(step-\d+|final)-g\d+\.(h5|json)\.[0-9a-f]+\.partial")
_LOOKS = 5  # at a folder that changes while it is read


@dataclass(frozen=True)
class Origin:
    """Whose checkpoints these are.

    Attributes:
        run_id: The run.
        job: Digest of the job, from `configs.load.job_digest`.
    """

    run_id: str
    job: str


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read and is whole.

    Attributes:
        path: Of the .h5, for `trainer.checkpoint.read_checkpoint`.
        step: Optimizer updates completed.
        generation: Of the gang that wrote it.
        arrays: Large ones are read-only.
        meta: Plain values.
    """

    path: str
    step: int
    generation: int
    arrays: Arrays
    meta: dict[str, Any]


class CheckpointStore:
    """Writes, finds and removes the checkpoints of one run.

    Everything blocks until storage has answered, at most for the patience that is set in the
    environment (see `data_pipeline.storage`); Python's lock is free meanwhile. What fails is a
    CheckpointError; only where a run may be about to start (`newest`, `final`, `has_any`,
    `last_generation`) a store that refuses is the user's mistake, a DataError.

    Args:
        uri: A folder, or a URI such as s3://bucket/prefix; made by the first save.
        origin: Whose checkpoints are written, and the only ones that are read and removed.
        now: Seconds since 1970, for the record.
    """

    def __init__(self, uri: str, origin: Origin, now: Callable[[], float] = time.time) -> None:
        self._uri = storage.absolute(uri.removeprefix("file://").rstrip("/") or "/")
        self._origin = origin
        self._now = now
        self._manifests: dict[str, Manifest] = {}  # of this run, by name; they never change

    def save(
        self,
        step: int,
        generation: int,
        arrays: Arrays,
        meta: Mapping[str, Any],
        kind: str = "step",
        metrics: Mapping[str, float] | None = None,
    ) -> str:
        """Write a checkpoint, whole or not at all; returns the path of its .h5.

        A second one of the same step and generation takes the place of the first.

        Raises:
            CheckpointError: Storage is full, refuses or does not answer; nothing is visible.
        """
        draft = self._draft(step, generation, kind, metrics or {})
        return self._save(checkpoint_name(step, generation), draft, arrays, meta)

    def save_final(
        self, generation: int, arrays: Arrays, meta: Mapping[str, Any], step: int = 0
    ) -> str:
        """Write the trained weights, as `save` does; they are never among `newest`, nor pruned."""
        draft = self._draft(step, generation, FINAL, {})
        return self._save(checkpoint_name(None, generation), draft, arrays, meta)

    def newest(self, most_generation: int | None = None) -> tuple[Found | None, list[str]]:
        """The newest whole checkpoint, and a sentence for each newer one that was skipped.

        Args:
            most_generation: No writer so far had a later generation. A checkpoint that says so is
                skipped.

        Raises:
            CheckpointError: All there is belongs to others, or storage does not answer.
        """
        return self._search(most_generation, is_final=False)

    def final(self) -> tuple[Found | None, list[str]]:
        """The trained weights of the latest generation; else as `newest`."""
        return self._search(None, is_final=True)

    def has_any(self) -> bool:
        """Whether there may be something to go on from: one listing, nothing is read."""
        with self._reading():
            return any(slot.is_complete for slot in list_slots(self._uri, is_final=False))

    def last_generation(self) -> int:
        """The latest generation that a checkpoint here is of, whole or not; 0 without one.

        Who goes on from here begins with a later one, so that nothing is written twice.
        """
        with self._reading():
            names = [parse_name(entry.name) for entry in storage.list_folder(self._uri)]
        return max((name.generation for name in names if name is not None), default=0)

    def prune(self, keep: int, best_by: str | None, best_mode: str) -> list[str]:
        """Remove all checkpoints but the `keep` newest, and the best one by a metric.

        Args:
            keep: How many.
            best_by: Name of a metric that was given to `save`. Of equal ones the first is kept.
            best_mode: `min`, `max`, or `auto`: by the name.

        Returns:
            Paths of the removed .h5 files.

        Raises:
            CheckpointError: Storage refuses or does not answer; what is gone is gone whole.
        """
        with self._removing():
            own = self._own(is_final=False)
            whole = [(slot, manifest) for slot, manifest in own if _fits(slot, manifest)]
            if len(whole) < keep:
                return []
            oldest = whole[keep - 1][0].name.order
            best = None if best_by is None else _best(whole, best_by, best_mode)
            gone = [
                slot.name
                for slot, _ in own
                if slot.name.order < oldest and slot.name.stem != best and not slot.has_folder
            ]
            for name in gone:
                self._remove(name)
        return [self._path(name.data) for name in gone]

    def clean(self) -> None:
        """Remove what writers that died left behind; for who is the only writer now.

        These are partial files, and .h5 files without a manifest that are older than a checkpoint.

        Raises:
            CheckpointError: Storage refuses or does not answer.
        """
        with self._removing():
            for entry in storage.list_folder(self._uri):
                if _PARTIAL.fullmatch(entry.name) and entry.is_file:
                    storage.remove(self._path(entry.name))
            for is_final in (False, True):
                own = self._own(is_final)
                whole = [slot.name.order for slot, manifest in own if _fits(slot, manifest)]
                for slot in list_slots(self._uri, is_final):
                    if slot.is_leftover and whole and slot.name.order < whole[0]:
                        storage.remove(self._path(slot.name.data))

    def _draft(
        self, step: int, generation: int, kind: str, metrics: Mapping[str, float]
    ) -> Manifest:
        """A manifest as far as it is known before the data."""
        return Manifest(
            run_id=self._origin.run_id,
            job=self._origin.job,
            step=step,
            generation=generation,
            kind=kind,
            file="",
            size_bytes=0,
            sha256="",
            metrics={key: float(value) for key, value in metrics.items() if math.isfinite(value)},
            time=self._now(),
            versions=package_versions(),
        )

    def _save(
        self, name: CheckpointName, draft: Manifest, arrays: Arrays, meta: Mapping[str, Any]
    ) -> str:
        path = self._path(name.data)
        try:
            packed = pack(arrays, meta)
            size_bytes, sha256 = packed.size_bytes, packed.sha256
            manifest = replace(draft, file=name.data, size_bytes=size_bytes, sha256=sha256)
            storage.make_folder(self._uri)
            if storage.exists(self._path(name.manifest)):
                self._remove(name)
            self._write(name, packed, manifest)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot write {path}: {error}. {_remedy(error)}") from error
        except (DataError, ReadError) as error:
            raise CheckpointError(f"cannot write {path}: {error}") from error
        self._manifests[name.stem] = manifest
        return path

    def _write(self, name: CheckpointName, packed: PackedCheckpoint, manifest: Manifest) -> None:
        with contextlib.ExitStack() as undo:
            # A full disk needs the room back. A store that failed is not asked again: what it has
            # is no checkpoint without a manifest, and with one it is whole.
            if not is_remote(self._uri):
                undo.callback(self._withdraw, name)
            storage.write_whole(self._path(name.data), *packed.pieces)
            storage.write_whole(self._path(name.manifest), manifest.dump())
            undo.pop_all()

    def _withdraw(self, name: CheckpointName) -> None:
        with contextlib.suppress(OSError):
            self._remove(name)

    def _remove(self, name: CheckpointName) -> None:
        """The manifest first: without it there is no checkpoint, however far this gets."""
        self._manifests.pop(name.stem, None)
        storage.remove(self._path(name.manifest))
        storage.remove(self._path(name.data))

    def _search(
        self, most_generation: int | None, is_final: bool
    ) -> tuple[Found | None, list[str]]:
        with self._reading():
            for _ in range(_LOOKS):
                with contextlib.suppress(ChangedError):
                    return self._look(most_generation, is_final)
        raise CheckpointError(
            f"{self._uri} changed as fast as it was looked at, {_LOOKS} times. One writer at a "
            "time is allowed; end the others."
        )

    def _look(self, most_generation: int | None, is_final: bool) -> tuple[Found | None, list[str]]:
        skipped: list[str] = []
        strangers: list[Manifest] = []
        has_own = False
        for slot in list_slots(self._uri, is_final):
            path = self._path(slot.name.data)
            try:
                manifest = read_manifest(self._uri, slot)
                if not self._is_of_origin(manifest):
                    strangers.append(manifest)
                    raise DamagedError(path, self._strangeness(manifest))
                has_own = True
                if most_generation is not None and manifest.generation > most_generation:
                    raise DamagedError(path, _too_late(manifest.generation, most_generation))
                arrays, meta = read_data(self._uri, slot, manifest)
            except DamagedError as damage:
                skipped.append(str(damage))
                continue
            return Found(path, manifest.step, manifest.generation, arrays, meta), skipped
        if strangers and not has_own:
            raise self._refusal(strangers[0])
        return None, skipped

    def _own(self, is_final: bool) -> list[tuple[Slot, Manifest]]:
        """Pairs of this run whose manifest is in order; each is read once in a lifetime."""
        own = []
        for slot in list_slots(self._uri, is_final):
            if slot.manifest is None:
                continue
            manifest = self._manifests.get(slot.name.stem)
            if manifest is None:
                with contextlib.suppress(DamagedError, ChangedError):
                    manifest = read_manifest(self._uri, slot)
            if manifest is not None and self._is_of_origin(manifest):
                self._manifests[slot.name.stem] = manifest
                own.append((slot, manifest))
        return own

    def _is_of_origin(self, manifest: Manifest) -> bool:
        return self._origin == Origin(manifest.run_id, manifest.job)

    def _strangeness(self, manifest: Manifest) -> str:
        if manifest.job != self._origin.job:
            return f"is of another job ({manifest.job}; this one is {self._origin.job})"
        return f"is of another run ({manifest.run_id}; this one is {self._origin.run_id})"

    def _refusal(self, manifest: Manifest) -> CheckpointError:
        return CheckpointError(
            f"{self._uri} holds checkpoints of run {manifest.run_id}, job {manifest.job}; those of "
            f"run {self._origin.run_id}, job {self._origin.job} are allowed. Name another place in "
            "checkpoint.uri, or the run and the job that wrote them."
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Failures of storage as CheckpointError: they say nothing of the checkpoints."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self._uri}: storage failed: {error}. {_remedy(error)}"
            ) from error
        except ReadError as error:
            raise CheckpointError(f"checkpoints cannot be reached: {error}") from error

    @contextlib.contextmanager
    def _removing(self) -> Iterator[None]:
        """As `_reading`; who may not remove is told so in the middle of a run."""
        try:
            with self._reading():
                yield
        except DataError as error:
            raise CheckpointError(f"old checkpoints cannot be removed: {error}") from error

    def _path(self, file: str) -> str:
        return f"{self._uri}/{file}"


def _fits(slot: Slot, manifest: Manifest) -> bool:
    """Whether the data is there in full; what is in it is not read."""
    return (
        slot.is_complete and slot.data is not None and slot.data.size_bytes == manifest.size_bytes
    )


def _best(pairs: list[tuple[Slot, Manifest]], metric: str, mode: str) -> str | None:
    """Stem of the best one; the first of equal ones. None if none has the metric."""
    is_more = is_more_better(metric) if mode == "auto" else mode == "max"
    scores = [
        (-manifest.metrics[metric] if is_more else manifest.metrics[metric], manifest.step, stem)
        for stem, manifest in ((slot.name.stem, manifest) for slot, manifest in pairs)
        if metric in manifest.metrics
    ]
    return min(scores)[-1] if scores else None


def _too_late(generation: int, most: int) -> str:
    return (
        f"is of generation {generation}; none later than {most} can have written: it is damaged, "
        "or another writer's"
    )


def _remedy(error: OSError | RuntimeError) -> str:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free the storage, or name another place in checkpoint.uri."
    return "Check the storage and its permissions, or name another place in checkpoint.uri."
