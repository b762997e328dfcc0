"""The models that answer now: which version a name stands for, and which versions are in memory.

Owns aliases and memory. A watcher looks at the registry once a second. Where an alias has moved and
its old version is in memory, the new one is loaded and warmed first; only then does the alias
switch, in one assignment, so no request meets a version that is not there. The old version answers
what it has taken, and leaves when its memory is needed: least recently used first, never while
something waits for it. A version that cannot be loaded leaves the alias where it was, and is not
tried again for a while that doubles: who asks for it neither drives others out of the memory nor
keeps the loader busy. Versions come in one at a time, from the first look at the memory to the last
warm call, so two of them never count on the same room.

Everything here runs in one event loop; loading and the registry run in threads. A request for a
version in memory touches neither.
"""

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import EnvironmentFailure, LockstepError, did_you_mean
from data_pipeline.features import Array
from registry.errors import RegistryError
from registry.references import check_name
from registry.store import ModelSummary, Registry, Version
from serving.errors import NotFound, Unavailable
from serving.json_rows import RowParser
from serving.lane import BatchFacts, Lane, LaneClosed, LaneLimits
from serving.metrics import Metrics
from serving.predictor import Predictor, load_predictor

CHAMPION = "champion"

_LOG = logging.getLogger(__name__)
_WARM_ROWS = (1, 8, 64, 512)
_FIXED_COST_BYTES = 16 * 2**20
_COST_FACTOR = 2
_RETRY_LOAD_S = 30.0
_MOST_RETRY_LOAD_S = 960.0


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of the engine.

    Attributes:
        memory_bytes: Of all versions in memory together, as estimated from their files. A version
            greater than this is loaded when it is the only one.
        poll_s: Time between two looks at the registry.
        lane: Bounds of each version's queue.
        drain_s: The longest wait for requests when the service ends.
    """

    memory_bytes: int = 2 * 2**30
    poll_s: float = 1.0
    lane: LaneLimits = field(default_factory=LaneLimits)
    drain_s: float = 30.0


@dataclass(eq=False)
class LiveModel:
    """A version in memory."""

    version: Version
    predictor: Predictor
    parser: RowParser
    lane: Lane
    cost_bytes: int
    used_at: float

    @property
    def labels(self) -> tuple[str, str]:
        """Name and number, for metrics."""
        return self.version.name, str(self.version.number)


class Engine:
    """The predictors of one process.

    `start`, then any number of `model` and `predict`, then `stop`; all in one event loop.

    Args:
        registry: Where versions and aliases are.
        limits: Bounds.
        metrics: Is told of batches, loads and queues.
        load: From an artifact's folder to its predictor; called in a thread, one at a time.
    """

    def __init__(
        self,
        registry: Registry,
        limits: EngineLimits | None = None,
        metrics: Metrics | None = None,
        load: Callable[[Path], Predictor] = load_predictor,
    ) -> None:
        self._registry = registry
        self._limits = limits or EngineLimits()
        self._metrics = metrics or Metrics()
        self._load = load
        self._loader = ThreadPoolExecutor(1, "loader")
        self._models: dict[str, ModelSummary] = {}
        self._targets: dict[tuple[str, str], int] = {}
        self._moves: dict[tuple[str, str], tuple[int, asyncio.Task[None]]] = {}
        self._failed: dict[tuple[str, int], tuple[float, float]] = {}  # until when, for how long
        self._turn = asyncio.Lock()
        self._live: dict[tuple[str, int], LiveModel] = {}
        self._loading: dict[tuple[str, int], asyncio.Task[LiveModel]] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._is_ready = False

    @property
    def is_ready(self) -> bool:
        """Whether the registry was read and the service is not about to end."""
        return self._is_ready

    async def start(self) -> None:
        """Read the registry, and begin to watch it.

        Raises:
            DatabaseFailure: The registry cannot be read.
        """
        await self.refresh()
        self._watcher = asyncio.create_task(self._watch())
        self._is_ready = True

    async def stop(self) -> None:
        """Take no more requests, answer those that wait, and let go of all models."""
        self._is_ready = False
        tasks: list[asyncio.Task[Any]] = [task for _, task in self._moves.values()]
        tasks += [*self._loading.values(), *([self._watcher] if self._watcher else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        lanes = [live.lane for live in self._live.values()]
        for lane in lanes:
            lane.close()
        for lane in lanes:
            await asyncio.to_thread(lane.join, self._limits.drain_s)
        self._live.clear()
        self._loader.shutdown(wait=False)

    def names(self) -> list[str]:
        """All models of the registry, as of the last look."""
        return sorted(self._models)

    def knows(self, name: str) -> bool:
        """Whether there is a model of this name, as of the last look."""
        return name in self._models

    def number_of(self, name: str, alias: str = CHAMPION) -> int:
        """The version that an alias stands for now, for requests that do not name one.

        Raises:
            NotFound: There is no such model or alias.
        """
        number = self._targets.get((name, alias))
        if number is not None:
            return number
        if name not in self._models:
            raise NotFound(f"there is no model {name!r}.")  # what others may see is not told
        aliases = sorted(self._models[name].aliases)
        raise NotFound(
            f"{name!r} has no alias {alias!r}; {', '.join(aliases) or 'no alias'} and versions by "
            f"number are allowed.{did_you_mean(alias, aliases)} Name one of them."
        )

    def is_loaded(self, name: str, number: int) -> bool:
        """Whether a version is in memory."""
        return (name, number) in self._live

    async def model(self, name: str, number: int) -> LiveModel:
        """A version in memory; loaded where it is not, once for all who wait for it.

        Raises:
            NotFound: There is no such version, or it was deleted.
            Unavailable: It cannot be loaded now.
        """
        live = self._live.get((name, number))
        if live is None:
            live = await self._loaded(name, number)
        live.used_at = time.monotonic()
        return live

    async def predict(self, live: LiveModel, rows: Array, user: str, deadline: float) -> Array:
        """Predictions for rows that `live.predictor.rows` made.

        Raises:
            What `Lane.predict` raises.
        """
        if len(rows) == 0:
            return np.empty((0, *live.predictor.signature.output_shape), np.float32)
        while True:
            try:
                return await live.lane.predict(rows, user, deadline)
            except LaneClosed:  # it left memory between the look-up and now
                if not self._is_ready:
                    raise Unavailable("the service is about to end.") from None
                live = await self.model(live.version.name, live.version.number)

    async def versions(self, name: str) -> list[Version]:
        """All versions of a model from the registry, the oldest first.

        Raises:
            NotFound: There is no such model.
            DatabaseFailure: The registry cannot be read.
        """
        try:
            check_name(name)
            return await asyncio.to_thread(self._registry.versions, name)
        except RegistryError:
            raise NotFound(f"there is no model {name!r}.") from None

    async def unload(self, name: str, number: int) -> None:
        """Let go of a version, after it has answered what it has taken."""
        live = self._live.get((name, number))
        if live is not None:
            self._let_go(live)
            await asyncio.to_thread(live.lane.join, self._limits.drain_s)

    async def refresh(self) -> None:
        """Look at the registry once.

        Raises:
            DatabaseFailure: It cannot be read; everything stays as it was.
        """
        found, deleted = await asyncio.to_thread(self._read, sorted({n for n, _ in self._live}))
        self._models = {model.name: model for model in found}
        wanted = {
            (model.name, alias): number
            for model in found
            for alias, number in model.aliases.items()
        }
        for target in set(self._targets) - set(wanted):
            del self._targets[target]
        for target, number in wanted.items():
            self._aim(target, number)
        for key in deleted & set(self._live):
            self._let_go(self._live[key])
        self._show_queues()

    # -- within -------------------------------------------------------------------------------

    def _read(self, loaded: list[str]) -> tuple[list[ModelSummary], set[tuple[str, int]]]:
        deleted = set()
        for name in loaded:
            with contextlib.suppress(RegistryError):
                versions = self._registry.versions(name)
                deleted |= {(name, v.number) for v in versions if v.state != "ready"}
        return self._registry.models(), deleted

    def _aim(self, target: tuple[str, str], number: int) -> None:
        """Let an alias stand for a version, as soon as that version can answer."""
        now = self._targets.get(target)
        move = self._moves.get(target)
        if now == number:
            if move is not None:  # it moved there and back
                move[1].cancel()
                self._moves.pop(target, None)
            return
        if move is not None and move[0] == number:
            return
        if move is not None:
            move[1].cancel()
        name = target[0]
        if now is None or (name, now) not in self._live or (name, number) in self._live:
            self._moves.pop(target, None)
            self._targets[target] = number
        elif not self._rest_s((name, number)):
            self._moves[target] = (number, asyncio.create_task(self._move(target, number)))

    async def _move(self, target: tuple[str, str], number: int) -> None:
        name, alias = target
        try:
            await self._loaded(name, number)
        except LockstepError as error:
            _LOG.error(
                "%s@%s stays at %s: %s/%s cannot be loaded: %s",
                *(name, alias, self._targets.get(target), name, number, error),
            )
        else:
            self._targets[target] = number
        finally:
            if self._moves.get(target, (None,))[0] == number:
                del self._moves[target]

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._limits.poll_s)
            try:
                await self.refresh()
            except LockstepError as error:  # nothing that the next look could not find better
                self._metrics.poll_failures.add(1)
                _LOG.warning("the registry cannot be read: %s", error)

    async def _loaded(self, name: str, number: int) -> LiveModel:
        key = (name, number)
        if key in self._live:
            return self._live[key]
        task = self._loading.get(key)
        if task is None:
            task = asyncio.create_task(self._bring_in(name, number))
            self._loading[key] = task
            task.add_done_callback(lambda _: self._loading.pop(key, None))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)  # others wait for it too

    async def _bring_in(self, name: str, number: int) -> LiveModel:
        loop = asyncio.get_running_loop()
        try:
            version = await asyncio.to_thread(self._registry.version, name, number)
        except RegistryError:
            raise NotFound(f"there is no version {number} of a model {name!r}.") from None
        if version.state != "ready":
            raise NotFound(f"version {number} of {name!r} was deleted.")
        rest_s = self._rest_s((name, number))
        if rest_s:
            raise Unavailable(f"{version} could not be loaded; the log tells why.", rest_s)
        cost_bytes = _FIXED_COST_BYTES + _COST_FACTOR * version.size_bytes
        labels = (name, str(number))
        async with self._turn:
            await self._make_room(cost_bytes)
            try:
                predictor = await loop.run_in_executor(self._loader, self._fetch_and_load, version)
            except Exception as error:
                self._metrics.loads.add(1, *labels, "failed")
                _LOG.error("%s cannot be loaded: %s", version, error)
                wait_s = self._failed_to_load((name, number), error)
                raise Unavailable(
                    f"{version} cannot be loaded; the log tells why.", wait_s
                ) from error
            self._failed.pop((name, number), None)
            self._metrics.loads.add(1, *labels, "loaded")
            observe = self._observer(labels)
            lane = Lane(str(version), predictor.predict_rows, self._limits.lane, observe)
            parser = RowParser(predictor)
            live = LiveModel(version, predictor, parser, lane, cost_bytes, time.monotonic())
            self._live[name, number] = live
        self._show_loaded()
        return live

    def _failed_to_load(self, key: tuple[str, int], error: Exception) -> float:
        """Remember a failure; when to try again, in seconds."""
        if isinstance(error, EnvironmentFailure):
            wait_s = 1.0  # storage, not the version
        else:
            _, before_s = self._failed.get(key, (0.0, 0.0))
            wait_s = min(max(2 * before_s, _RETRY_LOAD_S), _MOST_RETRY_LOAD_S)
        self._failed[key] = time.monotonic() + wait_s, wait_s
        return wait_s

    def _rest_s(self, key: tuple[str, int]) -> float:
        """For how long a version that could not be loaded is not tried again; 0: it may be."""
        until, _ = self._failed.get(key, (0.0, 0.0))
        return max(0.0, until - time.monotonic())

    def _fetch_and_load(self, version: Version) -> Predictor:
        predictor = self._load(self._registry.fetch(version))
        shape = predictor.signature.layout.input_shape
        for rows in _WARM_ROWS:
            predictor.predict_rows(np.zeros((rows, *shape), np.float32))
        return predictor

    async def _make_room(self, cost_bytes: int) -> None:
        for _ in range(100):
            used = sum(live.cost_bytes for live in self._live.values())
            if not self._live or used + cost_bytes <= self._limits.memory_bytes:
                return
            idle = [live for live in self._live.values() if live.lane.is_idle]
            if idle:
                self._let_go(min(idle, key=lambda live: live.used_at))
            else:
                await asyncio.sleep(0.02)
        raise Unavailable(
            "the memory for models is full of models at work; send the request again later.", 2.0
        )

    def _let_go(self, live: LiveModel) -> None:
        del self._live[live.version.name, live.version.number]
        live.lane.close()
        self._metrics.unloads.add(1, *live.labels)
        self._show_loaded()
        asyncio.get_running_loop().run_in_executor(self._loader, gc.collect)  # graphs are cycles

    def _observer(self, labels: tuple[str, str]) -> Callable[[BatchFacts], None]:
        metrics = self._metrics

        def observe(facts: BatchFacts) -> None:
            rows = sum(facts.rows.values())
            metrics.rows.add(rows, *labels)
            metrics.batch_rows.observe(rows, *labels)
            metrics.batch_requests.observe(facts.requests, *labels)
            metrics.batch_seconds.observe(facts.seconds, *labels)
            metrics.waited.observe(facts.waited_s, *labels)
            for user, count in facts.rows.items():
                metrics.user_rows.add(count, user)
                metrics.user_compute.add(facts.seconds * count / rows, user)

        return observe

    def _show_loaded(self) -> None:
        self._metrics.loaded.clear()
        for live in self._live.values():
            self._metrics.loaded.set(1, *live.labels)
        self._metrics.loaded_bytes.set(sum(live.cost_bytes for live in self._live.values()))
        self._show_queues()

    def _show_queues(self) -> None:
        self._metrics.queue_rows.clear()
        for live in self._live.values():
            self._metrics.queue_rows.set(live.lane.waiting_rows, *live.labels)
