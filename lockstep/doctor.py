"""What this machine needs to train, keep and serve models: found, and how to mend what is not.

A fault is what will make commands fail; a warning what makes them slow or fail at size.
"""

import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from configs.errors import EnvironmentFailure, LockstepError
from registry.database import Database
from registry.store import Registry

_LEAST_MEMORY_BYTES = 4 * 2**30
_LEAST_DISK_BYTES = 2 * 2**30
_RAY_FULL = 0.95  # share of a disk above which Ray stops to write
_LEAST_SHM_BYTES = 512 * 2**20
_LEAST_FILES = 4096
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
_MOST_SOCKET_PATH = 107
_PROXIES = ("grpc_proxy", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
_TRAINED_LOSS = 1e-4  # of rows that a line fits exactly; 6 before training
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What, such as "memory".
        verdict: ok, warning or fault.
        found: What is there.
        remedy: What to do about it; empty where ok.
    """

    name: str
    verdict: Literal["ok", "warning", "fault"]
    found: str
    remedy: str = ""


def examine(is_training: bool = False) -> Iterator[Finding]:
    """Look at one thing after the other; each finding as it is there.

    Args:
        is_training: Also train a small model with two workers, in a temporary folder.
    """
    yield _packages()
    yield _cores()
    yield _memory()
    yield _shared_memory()
    yield _open_files()
    yield _temporary_folder()
    yield _loopback()
    yield _proxies()
    yield _attempt("database", _database, "Name another by LOCKSTEP_DATABASE or LOCKSTEP_HOME.")
    if is_training:
        yield _attempt("training", _train, "Run lockstep train with --verbose on a job of yours.")


def _packages() -> Finding:
    wanted = [Requirement(text) for text in metadata.requires("lockstep") or []]
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = list(filter(None, map(_unmet, needed)))
    if wrong:
        return Finding("packages", "fault", "; ".join(wrong), "Install lockstep anew with pip.")
    shown = ("tensorflow", "keras", "ray")
    found = ", ".join(
        [
            f"Python {platform.python_version()}",
            *(f"{name} {metadata.version(name)}" for name in shown),
        ]
    )
    return Finding("packages", "ok", f"{found} and {len(needed) - len(shown)} more")


def _unmet(wanted: Requirement) -> str | None:
    try:
        there = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return f"{wanted.name} is not installed"
    if wanted.specifier.contains(there, prereleases=True):
        return None
    return f"{wanted.name} {there} does not fit {wanted.specifier}"


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0))
    if usable < 2:
        remedy = "Two workers on one core share it; results are the same, training is slower."
        return Finding("cores", "warning", f"{usable}", remedy)
    return Finding("cores", "ok", f"{usable}")


def _memory() -> Finding:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with_limit = _CGROUP_MEMORY.read_text().strip() if _CGROUP_MEMORY.exists() else "max"
    if with_limit.isdigit():
        total = min(total, int(with_limit))
    found = f"{total / 2**30:.1f} GiB"
    if total < _LEAST_MEMORY_BYTES:
        remedy = "A worker takes 0.5 GiB and its data; give 4 GiB, or train with --workers 1."
        return Finding("memory", "warning", found, remedy)
    return Finding("memory", "ok", found)


def _shared_memory() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError as error:
        remedy = "Mount /dev/shm; Ray uses the disk instead, which is slow."
        return Finding("shared memory", "warning", str(error), remedy)
    found = f"{size / 2**20:,.0f} MiB"
    if size < _LEAST_SHM_BYTES:
        remedy = f"Give /dev/shm {_LEAST_SHM_BYTES // 2**20} MiB (docker run --shm-size)."
        return Finding("shared memory", "warning", found, remedy)
    return Finding("shared memory", "ok", found)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft:,} (at most {hard:,})"
    if soft < _LEAST_FILES:
        remedy = f"Raise the limit before you serve many users: ulimit -n {_LEAST_FILES}."
        return Finding("open files", "warning", found, remedy)
    return Finding("open files", "ok", found)


def _temporary_folder() -> Finding:
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Finding("temporary folder", "fault", str(error), "Set TMPDIR to one that exists.")
    found = f"{folder}, {usage.free / 2**30:.1f} GiB free"
    if not os.access(folder, os.W_OK):
        return Finding("temporary folder", "fault", f"{found}, not writable", "Set TMPDIR.")
    if len(folder) + len(_RAY_SOCKET) > _MOST_SOCKET_PATH:
        remedy = "Ray's sockets need a shorter path. Set RAY_TMPDIR, such as /tmp."
        return Finding("temporary folder", "fault", f"{found}, {len(folder)} characters", remedy)
    if usage.free < _LEAST_DISK_BYTES or usage.used > _RAY_FULL * usage.total:
        remedy = "Ray stops to write where a disk is 95 % full. Free some, or set RAY_TMPDIR."
        return Finding("temporary folder", "warning", found, remedy)
    return Finding("temporary folder", "ok", found)


def _loopback() -> Finding:
    remedy = "Embedded Ray and the collectives of one machine talk over 127.0.0.1; allow it."
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = server.getsockname()
            with socket.create_connection(address, timeout=5):
                return Finding("loopback", "ok", "127.0.0.1 answers")
    except OSError as error:
        return Finding("loopback", "fault", str(error), remedy)


def _proxies() -> Finding:
    there = [name for name in _PROXIES if os.environ.get(name)]
    exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if not there:
        return Finding("proxies", "ok", "none")
    if "127.0.0.1" in exempt or exempt.strip() == "*":
        return Finding("proxies", "ok", f"{', '.join(there)}; not for 127.0.0.1")
    remedy = "Collectives would go through it. Add 127.0.0.1,localhost and your nodes to no_proxy."
    return Finding("proxies", "warning", ", ".join(there), remedy)


def _database() -> str:
    database = Database()
    try:
        Registry(database).prepare()
        return database.name
    finally:
        database.close()


def _train() -> str:
    import numpy as np

    from data_pipeline.arrays import from_arrays
    from lockstep import api

    began = time.monotonic()
    inputs = np.random.default_rng(7).normal(size=(512, 3)).astype(np.float32)
    rows = (inputs, inputs @ np.array([1.0, -2.0, 0.5], np.float32))
    with tempfile.TemporaryDirectory(prefix="lockstep-doctor-") as folder:
        job = {
            "name": "doctor",
            "model": {"layers": [{"Dense": {"units": 1}}]},
            "compile": {"optimizer": {"SGD": {"learning_rate": 0.1}}, "loss": "mse"},
            "data": from_arrays(rows, test=rows, folder=f"{folder}/data"),
            "train": {"epochs": 2, "global_batch_size": 32, "seed": 7},
            "cluster": {"workers": 2},
            "runs_dir": f"{folder}/runs",
        }
        summary = api.train(job).summary
    loss = summary["metrics"]["test"]["loss"]
    if not loss < _TRAINED_LOSS:
        raise EnvironmentFailure(f"two workers trained to a loss of {loss:.3g}; 0 is right")
    return f"two workers trained {summary['rows_seen']:,} rows, {time.monotonic() - began:.0f} s"


def _attempt(name: str, attempt: Callable[[], str], remedy: str) -> Finding:
    try:
        return Finding(name, "ok", attempt())
    except (LockstepError, OSError) as error:
        return Finding(name, "fault", str(error), remedy)
