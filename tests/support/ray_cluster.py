"""A Ray cluster of several nodes on this machine's loopback, with its jobs API, for a `with` block.

with Cluster(head_cpus=0) as cluster:
    node = cluster.add_node(cpus=2)
    cluster.address   # http://127.0.0.1:PORT, what `lockstep submit --address` takes
    node.kill()
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 120.0
_STORE_BYTES = 100_000_000


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class RayNode:
    """One `ray start --block`, and all the processes below it."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while b"Ray runtime started" not in (said := log.read_bytes()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start: {said.decode()}")
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        """Its processes; Ray's own ones are this node's because of their session."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            found = [root, *root.children(recursive=True)]
        return found

    def kill(self) -> None:
        """End everything that runs on this node, at once."""
        _end(self.processes(), signal.SIGKILL)
        self.process.wait(20)


class Cluster:
    """A head and nodes; its end leaves no process and no file.

    Attributes:
        address: Of the jobs API.
        folder: Short-lived files; LOCKSTEP_HOME is `home` in it.
    """

    def __init__(self, head_cpus: int = 0, environment: dict[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ls-ray-", dir="/tmp"))
        self.home = self.folder / "home"
        self.home.mkdir()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "LOCKSTEP_HOME": str(self.home),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "CUDA_VISIBLE_DEVICES": "-1",
            **(environment or {}),
        }
        self.port, dashboard, agent, client = free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        self._head_options = [
            "--head",
            f"--port={self.port}",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}",
            f"--temp-dir={self.folder / 'ray'}",
        ]
        self._head_cpus = head_cpus
        self.nodes: list[RayNode] = []

    def __enter__(self) -> "Cluster":
        try:
            self._start(self._head_options, self._head_cpus)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        left = [process for node in self.nodes for process in node.processes()]
        left += [process for process in psutil.process_iter() if self._is_ours(process)]
        _end(left, signal.SIGKILL)
        for node in self.nodes:
            node.process.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add_node(self, cpus: int) -> RayNode:
        """One more node."""
        (agent,) = free_ports(1)
        options = [f"--address=127.0.0.2:{self.port}", f"--dashboard-agent-listen-port={agent}"]
        return self._start(options, cpus)

    def run(self, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """`lockstep ARGUMENTS` in a process of its own, to its end."""
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=240,
            **{"env": self.client_environment, "cwd": self.folder, **options},
        )  # fmt: skip

    def command(self, *arguments: str) -> list[str]:
        """The words of `lockstep ARGUMENTS`."""
        return [sys.executable, "-m", "lockstep.cli", *arguments]

    @property
    def client_environment(self) -> dict[str, str]:
        """What a client on another machine would have: nothing of the cluster's."""
        return {**self.environment, "LOCKSTEP_HOME": str(self.folder / "client")}

    def ours(self) -> list[psutil.Process]:
        """All processes that belong to this cluster."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _start(self, options: list[str], cpus: int) -> RayNode:
        command = [
            str(BIN / "ray"),
            "start",
            *options,
            f"--node-ip-address=127.0.0.{len(self.nodes) + 2}",  # of the loopback, as it stands
            f"--num-cpus={cpus}",
            "--num-gpus=0",
            "--disable-usage-stats",
            f"--object-store-memory={_STORE_BYTES}",
            "--block",
        ]
        node = RayNode(command, self.environment, self.folder / f"node{len(self.nodes)}.log")
        self.nodes.append(node)
        return node

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("LOCKSTEP_HOME") == str(self.home)
        except psutil.Error:
            return False


def _end(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    psutil.wait_procs(processes, timeout=20)
