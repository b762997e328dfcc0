"""The gang: all hosts of a run, placed together, and the formations they go through.

Owns placement (all workers or none), the start of templates, the meeting of one generation, and
its end. Whom to form and when is the coordinator's decision.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.channel import Message
from cluster.errors import GangFailure, StartTimeout
from cluster.host import Host
from cluster.template import Launch

_POLL_S = 2.0
_KILL_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class GangSpec:
    """What to place.

    Attributes:
        name: Unique; the reservation can be given back under it when the coordinator is gone.
        workers: Number of hosts.
        cpus: Cores of each.
        gpus: GPUs of each.
        preload: Modules that templates import.
        environment: Added to the templates' environment.
        log_dir: Receives `template-RANK.log` and `rank-RANK.log`.
        start_timeout_s: Bound of placement and of the templates' start, each.
    """

    name: str
    workers: int
    cpus: int
    gpus: int
    preload: tuple[str, ...]
    environment: dict[str, str]
    log_dir: str
    start_timeout_s: float


class Gang:
    """Hosts in their ranks. Used by one thread."""

    def __init__(self, spec: GangSpec) -> None:
        self.spec = spec
        self.hosts: list[Any] = []
        self._group: PlacementGroup | None = None
        self._formed: tuple[int, int] = (0, 0)
        self._polls: dict[Any, int] = {}

    def place(self) -> list[dict[str, Any]]:
        """Reserve the resources of all workers, start their hosts and templates.

        Returns:
            What each host's `start` told, by rank.

        Raises:
            StartTimeout: Resources or templates did not come within `start_timeout_s`.
        """
        spec = self.spec
        bundle = {"CPU": float(spec.cpus)} | ({"GPU": float(spec.gpus)} if spec.gpus else {})
        self._group = placement_group([bundle] * spec.workers, strategy="PACK", name=spec.name)
        if not self._group.wait(spec.start_timeout_s):
            raise StartTimeout(
                f"no room for {spec.workers} workers of {spec.cpus} CPU(s) and {spec.gpus} GPU(s) "
                f"within {spec.start_timeout_s:g} s: others hold the resources. Wait for them, or "
                "raise cluster.start_timeout_s."
            )
        self.hosts = [self._create_host(rank) for rank in range(spec.workers)]
        starts = [self._start_host(rank) for rank in range(spec.workers)]
        try:
            told: list[dict[str, Any]] = ray.get(starts, timeout=spec.start_timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise StartTimeout(
                f"{spec.workers} templates did not start within {spec.start_timeout_s:g} s. See "
                f"{spec.log_dir}, or raise cluster.start_timeout_s."
            ) from None
        return told

    def form(self, generation: int, workers: int, entry: str, payload: Any) -> list[int]:
        """Fork one training process on each of the first `workers` hosts.

        Returns:
            Their process ids by rank.

        Raises:
            GangFailure: A host was lost meanwhile.
        """
        self._replace_lost()
        self._formed = (generation, workers)
        hosts = self.hosts[:workers]
        addresses = _reachable(self._ask([host.reserve.remote() for host in hosts]))
        launches = [
            Launch(
                generation, rank, addresses, entry, payload, f"{self.spec.log_dir}/rank-{rank}.log"
            )
            for rank in range(workers)
        ]
        pids: list[int] = self._ask(
            [host.launch.remote(launch) for host, launch in zip(hosts, launches, strict=True)]
        )
        return pids

    def messages(self, stall_after_s: float) -> Iterator[Message | None]:
        """Messages of the present generation as they come; None about every two seconds of silence.

        Raises:
            GangFailure: A host was lost, or nobody said anything for `stall_after_s`.
        """
        generation, workers = self._formed
        # A poll outlives its generation: given up, it would take the next one's messages with it.
        for rank in set(range(workers)) - set(self._polls.values()):
            self._polls[self.hosts[rank].poll.remote(_POLL_S)] = rank
        last_said = time.monotonic()
        while True:
            ready, _ = ray.wait(list(self._polls), num_returns=1, timeout=_POLL_S)
            said = [message for ref in ready for message in self._collect(ref)]
            for message in said:
                if message.generation == generation:
                    last_said = time.monotonic()
                    yield message
            if not said:
                yield None
            if time.monotonic() - last_said > stall_after_s:
                raise GangFailure(
                    f"no worker of generation {generation} said anything for {stall_after_s:g} s "
                    "(cluster.stall_after_s).",
                    "stalled",
                )

    def send(self, command: str, body: Any = None) -> None:
        """Send a command to every training process of the present generation."""
        generation, workers = self._formed
        for host in self.hosts[:workers]:
            host.send.remote(generation, command, body)

    def kill(self) -> None:
        """End all training processes at once; hosts and templates stay."""
        ray.wait(
            [host.kill.remote() for host in self.hosts],
            num_returns=len(self.hosts),
            timeout=_KILL_TIMEOUT_S,
        )

    def close(self) -> None:
        """End everything and give the resources back. Idempotent; never raises for a dead host."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait(
                [host.close.remote() for host in self.hosts],
                num_returns=len(self.hosts),
                timeout=_KILL_TIMEOUT_S,
            )
        for host in self.hosts:
            ray.kill(host)
        self.hosts = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _create_host(self, rank: int) -> Any:
        spec = self.spec
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=rank
        )
        actor = ray.remote(Host).options(
            num_cpus=spec.cpus,
            num_gpus=spec.gpus,
            max_concurrency=8,
            scheduling_strategy=strategy,
        )
        return actor.remote(spec.preload, spec.environment)

    def _ask(self, references: Sequence[Any]) -> list[Any]:
        try:
            answers: list[Any] = ray.get(list(references), timeout=self.spec.start_timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise GangFailure(
                f"hosts did not answer within {self.spec.start_timeout_s:g} s "
                "(cluster.start_timeout_s).",
                "not_formed",
            ) from None
        except ray.exceptions.RayActorError as error:
            raise GangFailure(f"a host was lost: {error}", "host_lost") from error
        except ray.exceptions.RayTaskError as error:
            raise GangFailure(f"a host could not fork: {error.cause}", "not_formed") from error
        return answers

    def _replace_lost(self) -> None:
        """Put a new host in the place of each that is gone or has lost its template."""
        checks = [host.has_template.remote() for host in self.hosts]
        lost = [rank for rank, check in enumerate(checks) if not _is_true(check)]
        for rank in lost:
            ray.kill(self.hosts[rank])
            self._polls = {poll: owner for poll, owner in self._polls.items() if owner != rank}
            self.hosts[rank] = self._create_host(rank)
        if lost:
            self._ask([self._start_host(rank) for rank in lost])

    def _start_host(self, rank: int) -> Any:
        spec = self.spec
        log_file = f"{spec.log_dir}/template-{rank}.log"
        return self.hosts[rank].start.remote(spec.start_timeout_s, log_file)

    def _collect(self, reference: Any) -> list[Message]:
        rank = self._polls.pop(reference)
        try:
            messages: list[Message] = ray.get(reference)
        except ray.exceptions.RayActorError as error:
            raise GangFailure(f"the host of rank {rank} was lost.", "host_lost", rank) from error
        self._polls[self.hosts[rank].poll.remote(_POLL_S)] = rank
        return messages


def release(name: str) -> None:
    """Give back what a gang has reserved, where its coordinator cannot; nothing if it has."""
    with contextlib.suppress(ValueError):  # no reservation of this name
        remove_placement_group(get_placement_group(name))


def _is_true(check: Any) -> bool:
    """The answer to a question put to a host; False where it is gone or silent."""
    try:
        return bool(ray.get(check, timeout=_KILL_TIMEOUT_S))
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return False


def _reachable(addresses: Sequence[str]) -> tuple[str, ...]:
    """Addresses under which the ranks meet: over loopback where one node holds them all."""
    nodes = {address.rpartition(":")[0] for address in addresses}
    if len(nodes) > 1:
        return tuple(addresses)
    return tuple(f"127.0.0.1:{address.rpartition(':')[2]}" for address in addresses)
