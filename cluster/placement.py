"""Placement: where the hosts of a gang go.

All workers are placed together, in one placement group, or none. Later hosts come one by one: into
a bundle of the group that a lost host has left, where its node is alive, else onto a node with
room, else they wait for room. Ray tells of a dead node after a quarter of a minute only, so a node
whose host broke off unannounced is shunned meanwhile.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from cluster.errors import StartTimeout
from cluster.host import Host, Place
from cluster.nodes import Node, alive_nodes, choose

_SHUNNED_S = 30.0


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
        log_dir: Receives `template-HOST.log` and `rank-RANK.log`.
        start_timeout_s: Bound of placement and of the templates' start, each.
        min_workers: Fewest hosts to go on with when lost ones are not replaced; 0: `workers`.
        standbys: Spare hosts to keep warm.
        replace_timeout_s: Longest wait for the replacement of a lost host; with `min_workers`
            also for those that find no room at the start.
        lease_s: A host ends its training process when it was not polled for so long, and counts
            as lost when it has not answered for so long.
    """

    name: str
    workers: int
    cpus: int
    gpus: int
    preload: tuple[str, ...]
    environment: dict[str, str] = field(repr=False)  # may hold secrets
    log_dir: str
    start_timeout_s: float
    min_workers: int = 0
    standbys: int = 0
    replace_timeout_s: float = 30.0
    lease_s: float = 20.0

    @property
    def is_elastic(self) -> bool:
        """Whether it may go on with fewer hosts."""
        return 0 < self.min_workers < self.workers

    @property
    def need(self) -> dict[str, float]:
        """What one host reserves, by Ray's names."""
        return {"CPU": float(self.cpus)} | ({"GPU": float(self.gpus)} if self.gpus else {})


@dataclass(eq=False)
class Seat:
    """What is known here of one host.

    Attributes:
        number: Counts all hosts of the run; names its log.
        actor: The host.
        bundle: Its place in the placement group; None outside.
        has_room: Whether there was room for it when it was asked for; else it waits for some.
        born_at: When it was asked for.
        placed: Its pending `where`; None once it has answered.
        started: Its pending `start`; None once it has answered.
        watched: Its pending `watch`, of a spare only.
        watched_at: When that was asked.
        node_id: Its node, once placed.
        address: The network address of its node, once placed.
        lifeline_port: Where its process holds lifelines, once placed.
        is_lost: It does not come back.
        is_leaving: It, or its node, has been told to end.
    """

    number: int
    actor: Any
    bundle: int | None
    has_room: bool
    born_at: float
    placed: Any | None = None
    started: Any | None = None
    watched: Any | None = None
    watched_at: float = 0.0
    node_id: str = ""
    address: str = ""
    lifeline_port: int = 0
    is_lost: bool = False
    is_leaving: bool = False

    def take_place(self, place: Place) -> None:
        """Note where it is."""
        self.placed = None
        self.node_id, self.address = place.node_id, place.address
        self.lifeline_port = place.lifeline_port

    @property
    def is_standing(self) -> bool:
        """Whether it can take part in the next formation, as far as known."""
        return self.can_answer and not self.is_leaving

    @property
    def can_answer(self) -> bool:
        """Whether it is there and not busy starting, as far as known."""
        return not self.is_lost and self.started is None


class Placement:
    """Finds places for hosts and starts them there. Used by one thread; only `reserve` blocks."""

    def __init__(self, spec: GangSpec, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec = spec
        self._clock = clock
        self._group: PlacementGroup | None = None
        self._bundles = 0
        self._shunned: dict[str, float] = {}
        self._asked = 0

    def reserve(self) -> list[Seat]:
        """Reserve the resources of all workers, and start a host in each bundle.

        A gang that may be smaller waits for its last hosts no longer than it would for the
        replacement of lost ones, and begins with those for which there is room.

        Raises:
            StartTimeout: Resources did not come within `start_timeout_s`.
        """
        spec = self._spec
        deadline = self._clock() + spec.start_timeout_s
        patience_s = spec.replace_timeout_s if spec.is_elastic else spec.start_timeout_s
        is_reserved = self._reserve(spec.workers, min(patience_s, spec.start_timeout_s))
        if not is_reserved and spec.is_elastic:
            self.release()
            fewer = max(spec.min_workers, min(self._room(), spec.workers - 1))
            is_reserved = self._reserve(fewer, max(1.0, deadline - self._clock()))
        if not is_reserved:
            raise StartTimeout(
                f"no room for {spec.min_workers or spec.workers} workers of {spec.cpus} CPU(s) and "
                f"{spec.gpus} GPU(s) within {spec.start_timeout_s:g} s: others hold the resources. "
                "Wait for them, or raise cluster.start_timeout_s."
            )
        return [self._start_host(bundle, None) for bundle in range(self._bundles)]

    def _reserve(self, bundles: int, timeout_s: float) -> bool:
        """Ask for room for so many hosts; returns whether it was there in time."""
        spec = self._spec
        self._group = placement_group([spec.need] * bundles, strategy="PACK", name=spec.name)
        self._bundles = bundles
        return bool(self._group.wait(timeout_s))

    def _room(self) -> int:
        """Hosts that would find a place now."""
        nodes, count = self._usable_nodes(), 0
        while node := choose(list(nodes.values()), self._spec.need, ()):
            nodes[node.node_id] = node.without(self._spec.need)
            count += 1
        return count

    def ask(self, hosts: int, held: Collection[int | None], used: Sequence[str]) -> list[Seat]:
        """Start more hosts; those that find no room wait for it.

        Args:
            hosts: How many.
            held: Bundles that are taken.
            used: The node of each present host: those with the fewest come first.
        """
        vacant = [bundle for bundle in range(self._bundles) if bundle not in held]
        nodes, bundle_nodes = self._usable_nodes(), self._bundle_nodes()
        ready = [bundle for bundle in vacant if bundle_nodes.get(bundle) in nodes]
        orphaned = [bundle for bundle in vacant if bundle not in ready]
        seats = []
        for _ in range(hosts):
            if ready:
                seats.append(self._start_host(ready.pop(0), None))
            elif node := choose(list(nodes.values()), self._spec.need, used):
                nodes[node.node_id] = node.without(self._spec.need)
                seats.append(self._start_host(None, node))
            else:  # Ray moves an orphaned bundle to where there is room, once its node is dead
                bundle = orphaned.pop(0) if orphaned else None
                seats.append(self._start_host(bundle, None, has_room=False))
        return seats

    def has_room(self, held: Collection[int | None]) -> bool:
        """Whether a host that was asked for now would find a place at once."""
        nodes, bundle_nodes = self._usable_nodes(), self._bundle_nodes()
        return choose(list(nodes.values()), self._spec.need, ()) is not None or any(
            bundle_nodes.get(bundle) in nodes
            for bundle in range(self._bundles)
            if bundle not in held
        )

    def shun(self, node_id: str) -> None:
        """Place nothing on a node for a while."""
        self._shunned[node_id] = self._clock() + _SHUNNED_S

    def start_template(self, seat: Seat) -> None:
        """Start the template of a host, or a new one."""
        log_file = f"{self._spec.log_dir}/template-{seat.number}.log"
        seat.started = seat.actor.start.remote(self._spec.start_timeout_s, log_file)

    def release(self) -> None:
        """Give the reservation back. Idempotent."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _usable_nodes(self) -> dict[str, Node]:
        now = self._clock()
        return {
            node.node_id: node
            for node in alive_nodes()
            if not node.is_draining and self._shunned.get(node.node_id, now) <= now
        }

    def _bundle_nodes(self) -> dict[int, str]:
        if self._group is None:
            return {}
        nodes: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        return nodes

    def _start_host(self, bundle: int | None, node: Node | None, has_room: bool = True) -> Seat:
        spec = self._spec
        strategy: Any = "DEFAULT"
        if bundle is not None:
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=bundle
            )
        elif node is not None:
            strategy = NodeAffinitySchedulingStrategy(
                node.node_id, soft=True, _spill_on_unavailable=True
            )
        actor = ray.remote(Host).options(
            num_cpus=spec.cpus,
            num_gpus=spec.gpus,
            max_concurrency=16,
            scheduling_strategy=strategy,
        )
        handle = actor.remote(spec.preload, spec.environment, spec.lease_s)
        seat = Seat(self._asked, handle, bundle, has_room, self._clock())
        self._asked += 1
        seat.placed = handle.where.remote()
        self.start_template(seat)
        return seat
