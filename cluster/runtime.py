"""The only place that starts or joins Ray.

Embedded by default: a Ray of its own on loopback, gone with the process. With an address it joins a
cluster. Everything that makes Ray quiet, private and able to hold a gang is decided here.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private import ray_constants, worker
from ray._private.authentication import authentication_token_setup

from cluster.errors import CapacityError
from cluster.growth import nodes_to_come
from configs.errors import EnvironmentFailure

_OBJECT_STORE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Need:
    """What a gang asks for; it can do without standbys, and with `fewest` workers (0: all)."""

    workers: int
    cpus: int
    gpus: int
    standbys: int = 0
    fewest: int = 0

    def __str__(self) -> str:
        """As a phrase for messages."""
        gpus = f" and {self.gpus} GPU(s)" if self.gpus else ""
        return f"{self.workers} workers with {self.cpus} CPU(s){gpus} each"


@contextlib.contextmanager
def session(
    need: Need, address: str | None = None, is_verbose: bool = False
) -> Iterator[list[str]]:
    """Ray for the time of a `with` block; yields warnings for the user.

    A Ray that this process has started or joined before is used and left as it is.

    Raises:
        CapacityError: The cluster can never place the gang.
        EnvironmentFailure: The cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():  # the caller's own Ray: use it and leave it running
        _check_capacity(need)
        yield []
        return
    level = logging.INFO if is_verbose else logging.ERROR
    if not is_verbose:
        _silence_notices()
    warnings = [] if address else _oversubscription(need)
    try:
        with _own_sigterm():
            if address:
                _use_token()
                ray.init(address=address, logging_level=level, log_to_driver=is_verbose)
            else:
                with on_loopback():
                    ray.init(
                        address="local",
                        num_cpus=max(
                            os.cpu_count() or 1, (need.workers + need.standbys) * need.cpus
                        ),
                        include_dashboard=False,
                        object_store_memory=_OBJECT_STORE_BYTES,
                        logging_level=level,
                        log_to_driver=is_verbose,
                        _node_ip_address="127.0.0.1",
                    )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at {address}" if address else "Ray on this machine"
        raise EnvironmentFailure(f"cannot reach {where}: {error}") from error
    try:
        _check_capacity(need)
        yield warnings
    finally:
        ray.shutdown()


@contextlib.contextmanager
def joined(address: str = "auto", node_ip: str | None = None) -> Iterator[None]:
    """The cluster that this machine is a node of, for the time of a `with` block.

    Args:
        address: The cluster.
        node_ip: Which of its nodes here, where this machine has several. None: the only one.

    Raises:
        EnvironmentFailure: There is none, or it does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with _own_sigterm():
            _use_token()
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                **({"_node_ip_address": node_ip} if node_ip else {}),
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EnvironmentFailure(f"cannot reach the cluster at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """A Ray that is started in this block, with 127.0.0.1 as its address, listens there alone.

    Ray takes 127.0.0.1 for the machine's address in its network, and then listens on every address,
    unless clusters are switched off, as on desktops. Its processes inherit that from the block.
    """
    variable = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(variable), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[variable] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False  # it was read at import
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before[0]


def node_address() -> str:
    """Where others of the cluster find this node; 127.0.0.1 for an embedded Ray."""
    address: str = ray.util.get_node_ip_address()
    return address


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """What this process does at SIGTERM stays so: Ray's core installs a handler that ends it."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def is_alive() -> bool:
    """Whether the Ray that this process has joined still answers."""
    try:
        return ray.is_initialized() and any(node["Alive"] for node in ray.nodes())
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, TimeoutError):
        return False


def _silence_notices() -> None:
    """Keep Ray's notices of dead workers off standard output, which may be a program's.

    Ray 2.60 prints them there whatever `log_to_driver` says. Our own events tell of the same.
    """
    worker.print_to_stdstream = lambda *_, **__: None


def _use_token() -> None:
    """Show a cluster that asks for it the token this user has.

    Ray 2.60 starts clusters with token authentication, but joins them without unless RAY_AUTH_MODE
    was set before it was imported.
    """
    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _oversubscription(need: Need) -> list[str]:
    cores = os.cpu_count() or 1
    asked = need.workers * need.cpus
    if asked <= cores:
        return []
    return [f"{need} on {cores} cores: they share them, each step takes longer."]


def _check_capacity(need: Need) -> None:
    """Whether nodes that are alive, or may come, could ever hold all workers, were they free."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = max(_places(nodes, need), _places(nodes_to_come(), need))
    if room < (need.fewest or need.workers):
        has = "; ".join(
            f"{resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU"
            for resources in nodes
        )
        raise CapacityError(
            f"the gang asks for {need}; the cluster has {len(nodes)} node(s) with {has}, room for "
            f"{room}. Use fewer workers or fewer CPUs and GPUs each, or add nodes."
        )


def _places(nodes: Sequence[Mapping[str, float]], need: Need) -> int:
    """Workers that the nodes would hold, were they free."""
    room = 0
    for resources in nodes:
        places = resources.get("CPU", 0) // need.cpus
        if need.gpus:
            places = min(places, resources.get("GPU", 0) // need.gpus)
        room += int(places)
    return room
