"""Several hosts on one machine: network namespaces on a bridge of their own, a Ray node in each.

Nothing in them reaches anything outside. A namespace is the handle on a node: all its processes can
be killed together, its link cut or slowed. Needs root and iproute2; `why_not` says what is missing.

    with Network() as network:
        head = network.start_head(cpus=0)
        worker = network.add_node(cpus=1)
        driver = head.popen(["python", "-m", "..."], stdout=subprocess.PIPE)
        worker.kill()
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
START_S = 90.0
_PORT = 6379
_STORE_BYTES = 100_000_000
_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def why_not() -> str:
    """The reason for which there can be no namespaces here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (ip)"
    name = f"lsx{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed: {error.stderr.strip()}"
    finally:
        for command in (("link", "del", name), ("netns", "del", name)):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(*command)
    return ""


class Node:
    """One host: a namespace, its link, and the Ray node in it.

    Attributes:
        name: Of the namespace.
        address: Of its end of the link.
    """

    def __init__(self, network: "Network", number: int, cpus: int) -> None:
        self.name = f"{network.name}n{number}"
        self.address = f"{network.subnet}.{number}"
        self._network = network
        self._link = f"{self.name}b"
        self._cpus = cpus
        self._is_head = number == 1
        self._is_cut = False
        self._ray: subprocess.Popen[bytes] | None = None
        _ip("netns", "add", self.name)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", self._link, "master", network.name, "up")
        _ip("-n", self.name, "link", "set", "lo", "up")
        _ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.name, "link", "set", "eth0", "up")
        # Leads nowhere; processes find their own address by asking for a way out.
        _ip("-n", self.name, "route", "add", "default", "via", f"{network.subnet}.254", "onlink",
            "dev", "eth0")  # fmt: skip

    def popen(self, command: list[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a process on this host; "python" stands for this interpreter."""
        command = [sys.executable if word == "python" else word for word in command]
        environment = {**os.environ, **_ENVIRONMENT, **options.pop("env", {})}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command], env=environment, **options
        )

    def start(self) -> None:
        """Start Ray on this host and wait until it says that it runs."""
        log = self._network.folder / f"{self.name}.log"
        dashboard = str(self._network.has_dashboard).lower()
        role = ["--head", f"--port={_PORT}", f"--include-dashboard={dashboard}",
                f"--dashboard-host={self.address}", "--dashboard-port=8265",
                f"--temp-dir={self._network.folder}/ray"]  # fmt: skip
        if not self._is_head:
            role = [f"--address={self._network.ray_address}"]
        command = [RAY, "start", *role, f"--node-ip-address={self.address}", "--block",
                   f"--num-cpus={self._cpus}", "--disable-usage-stats",
                   f"--object-store-memory={_STORE_BYTES}"]  # fmt: skip
        with open(log, "wb") as output:
            self._ray = self.popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_S
        while b"Ray runtime started" not in (said := log.read_bytes()):
            if self._ray.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start on {self.name}: {said.decode()}")
            time.sleep(0.05)

    def pids(self) -> list[int]:
        """All processes on this host."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def is_running(self) -> bool:
        """Whether its Ray is there."""
        return self._ray is not None and self._ray.poll() is None

    def kill(self) -> None:
        """Kill all processes of this host at once."""
        deadline = time.monotonic() + 20
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: {pids} survive SIGKILL")
            time.sleep(0.01)
        if self._ray is not None:
            self._ray.wait(20)

    def kill_raylet(self) -> None:
        """Kill Ray's own process on this host, and nothing else."""
        raylets = []
        for pid in self.pids():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if Path(f"/proc/{pid}/comm").read_text().strip() == "raylet":
                    raylets.append(pid)
        if len(raylets) != 1:
            raise RuntimeError(f"{self.name} has the raylets {raylets}")
        os.kill(raylets[0], signal.SIGKILL)

    def cut(self) -> None:
        """Take the cable out: nothing gets in or out, nobody is told."""
        self._is_cut = True
        _ip("link", "set", self._link, "down")

    def cut_from(self, other: "Node") -> None:
        """Let these two not reach each other any more; all others reach both."""
        for one, two in ((self, other), (other, self)):
            _ip("-n", one.name, "route", "add", "blackhole", f"{two.address}/32")

    def reconnect(self) -> None:
        """Put the cable in again, whatever has become of the host meanwhile."""
        _ip("-n", self.name, "route", "flush", "type", "blackhole")
        _ip("link", "set", self._link, "up")

    def slow(self, rate_mbit: float = 0.0, delay_ms: float = 0.0) -> None:
        """Limit what this host sends, or delay it.

        Raises:
            OSError: The kernel cannot do that; a delay needs its netem module.
        """
        shape = ["netem", "delay", f"{delay_ms}ms"]
        if rate_mbit:
            shape += ["rate", f"{rate_mbit}mbit"]
        if not delay_ms:
            shape = ["tbf", "rate", f"{rate_mbit}mbit", "burst", "32kb", "latency", "400ms"]
        command = ["tc", "-n", self.name, "qdisc", "replace", "dev", "eth0", "root", *shape]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")

    def restore(self) -> None:
        """Whole again: the link as at first, and Ray started anew where it ended or was cut off."""
        self.reconnect()
        subprocess.run(
            ["tc", "-n", self.name, "qdisc", "del", "dev", "eth0", "root"],
            capture_output=True,
            check=False,
        )
        if self._is_cut or not self.is_running():
            self._is_cut = False
            self.kill()
            self.start()

    def remove(self) -> None:
        """Nothing is left of it."""
        self.kill()
        for command in (("link", "del", self._link), ("netns", "del", self.name)):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(*command)


class Network:
    """A bridge, and the hosts on it. A context; its end leaves nothing.

    Attributes:
        name: Of the bridge, and the beginning of all names.
        subnet: First three numbers of the addresses.
        has_dashboard: Whether the head serves Ray's jobs API, on port 8265.
        folder: Short-lived files: logs of Ray by node, Ray's own folder.
        nodes: The hosts; the first one is the head.
    """

    def __init__(self, has_dashboard: bool = False) -> None:
        self.has_dashboard = has_dashboard
        self.name = f"ls{os.getpid() % 100_000}"
        self.subnet = "10.77.0"  # of a bridge of its own: others may use it as well
        self.folder = Path(tempfile.mkdtemp(prefix="lsn", dir="/tmp"))  # sockets want short paths
        self.nodes: list[Node] = []

    def __enter__(self) -> "Network":
        _ip("link", "add", self.name, "type", "bridge")
        _ip("link", "set", self.name, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            node.remove()
        _ip("link", "del", self.name)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def head(self) -> Node:
        """The host of Ray's head."""
        return self.nodes[0]

    @property
    def ray_address(self) -> str:
        """What drivers on any of the hosts join."""
        return f"{self.head.address}:{_PORT}"

    def start_head(self, cpus: int = 0) -> Node:
        """The first host."""
        return self.add_node(cpus)

    def add_node(self, cpus: int = 1) -> Node:
        """One more host, with its Ray running."""
        node = self.add_host(cpus)
        node.start()
        return node

    def add_host(self, cpus: int = 0) -> Node:
        """One more host, without Ray."""
        node = Node(self, len(self.nodes) + 1, cpus)
        self.nodes.append(node)
        return node


def _ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
