"""The host: one worker's place in the cluster, alive for the whole run.

A host keeps a template process and at most one training process, forked from it for each
generation. The coordinator draws messages with `poll`; a host that dies breaks its pending `poll`,
so one mechanism carries progress and tells of death. Nobody hears from a host behind a cut network:
it ends its training process itself when its lease has run out. Methods are thread-safe; Ray runs
them in a pool of threads and promises no order between them.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from cluster.channel import Message
from cluster.errors import StaleGeneration, TemplateLost
from cluster.lease import Lease
from cluster.lifeline import Beacon
from cluster.mailbox import Mailbox
from cluster.processes import Child, TemplateProcess
from cluster.stacks import stacks
from cluster.template import Launch

GRACE_S = 30.0  # what Kubernetes gives before its SIGKILL, unless told otherwise
_POLL_MESSAGES = 64
_POLL_BYTES = 64 * 2**20
_MAILBOX_BYTES = 256 * 2**20
_KILL_S = 10.0
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


@dataclass(frozen=True)
class Heard:
    """What a host tells at a poll.

    Attributes:
        messages: What its training process said, and how it ended.
        can_fork: Whether its template is there.
        is_leaving: It got SIGTERM: it ends within `GRACE_S`.
    """

    messages: list[Message]
    can_fork: bool
    is_leaving: bool


@dataclass(frozen=True)
class Place:
    """Where a host is.

    Attributes:
        node_id: Ray's name for the node.
        address: Its network address.
        lifeline_port: Where the host's process holds lifelines.
    """

    node_id: str
    address: str
    lifeline_port: int


class Host:
    """Keeps a template, forks training processes from it, and passes on what they say."""

    def __init__(
        self, preload: Sequence[str], environment: Mapping[str, str], lease_s: float
    ) -> None:
        self._preload = list(preload)
        self._environment = dict(environment)
        self._lease = Lease(lease_s)
        self._mailbox = Mailbox(_MAILBOX_BYTES)
        self._template: TemplateProcess | None = None
        self._child: Child | None = None
        self._fence = 0
        self._one_at_a_time = threading.Lock()
        self._held_port: socket.socket | None = None
        self._scratch = ""
        self._node = ("", "127.0.0.1")
        self._is_leaving = False
        self._beacon: Beacon | None = None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)  # Ray's would end us at once

    def where(self) -> Place:
        """This node; answers as soon as the host has a place."""
        self._node = _own_node()
        if self._beacon is None:
            self._beacon = Beacon(self._node[1])
        return Place(*self._node, self._beacon.port)

    def start(self, timeout_s: float, log_file: str) -> dict[str, Any]:
        """Start the template, or a new one, and wait until it has imported everything.

        Returns:
            `pid` of the host and `node` (its network address).

        Raises:
            StartTimeout: The template did not come up in time.
        """
        os.makedirs(os.path.dirname(log_file), exist_ok=True)
        with self._one_at_a_time:
            if self._template is not None:
                self._template.close()
            if not self._scratch:
                # What libraries drop in the temporary folder would outlive processes that end by
                # _exit.
                self._scratch = tempfile.mkdtemp(prefix=".scratch-", dir=os.path.dirname(log_file))
            self._template = TemplateProcess(self._mailbox)
            environment = {**self._environment, "TMPDIR": self._scratch}
            self._template.start(self._preload, environment, log_file, timeout_s)
        self._node = _own_node()
        return {"pid": os.getpid(), "node": self._node[1]}

    def prepare(self, fence: int) -> tuple[bool, str]:
        """Make ready for a launch, in one call: all that is older than `fence` ends here.

        Kills the training process, drops its messages, refuses launches of its generation, and
        holds a free port. The port stays bound here; TensorFlow shares it (SO_REUSEPORT), so that
        no other process can take it in between.

        Returns:
            Whether this host can fork, and `address:port`.
        """
        with self._one_at_a_time:
            self._fence = max(self._fence, fence)
            self._mailbox.fence(self._fence)
            self._end_child()
            if self._held_port is not None:
                self._held_port.close()
            self._held_port = held = socket.socket()
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(("", 0))
            can_fork = self._template is not None and self._template.can_fork
            return can_fork, f"{self._node[1]}:{held.getsockname()[1]}"

    def launch(self, launch: Launch) -> int:
        """Fork a training process; returns its process id. An earlier one is ended.

        Raises:
            StaleGeneration: A newer one has been prepared for or launched.
            TemplateLost: There is nothing to fork from.
        """
        with self._one_at_a_time:
            if launch.generation < self._fence:
                raise StaleGeneration(
                    f"generation {launch.generation} was to be launched after {self._fence}."
                )
            if self._template is None:
                raise TemplateLost("launch needs a started host.")
            self._fence = launch.generation
            self._end_child()
            self._lease.renew()
            named = replace(launch, stacks_file=f"{self._scratch}/stacks-{launch.generation}.txt")
            self._child = child = self._template.fork(named)
        threading.Thread(target=self._guard, args=(child,), name="lease", daemon=True).start()
        return child.pid

    def send(self, generation: int, number: int, command: str, body: Any = None) -> None:
        """Send a command to the training process of a generation; nothing if it has ended.

        Commands of a generation are numbered from 0 and passed on in that order.
        """
        child = self._child
        if child is not None and child.launch.generation == generation:
            child.send(number, command, body)

    def poll(self, timeout_s: float) -> Heard:
        """Messages since the last call, at most 64 and 64 MB; waits for the first of them.

        Renews the lease when it arrives.
        """
        self._lease.renew()
        messages = self._mailbox.take(timeout_s, _POLL_MESSAGES, _POLL_BYTES)
        can_fork = self._template is not None and self._template.can_fork
        return Heard(messages, can_fork, self._is_leaving)

    def watch(self, timeout_s: float) -> Heard:
        """For a host without a training process: returns at the end of its template, or in time."""
        if self._template is not None:
            self._template.wait(timeout_s)
        can_fork = self._template is not None and self._template.can_fork
        return Heard([], can_fork, self._is_leaving)

    def renew(self) -> None:
        """Renew the lease: the coordinator is there, though it has no time for messages."""
        self._lease.renew()

    def strike(self, generation: int, kind: str) -> bool:
        """Hurt this host or its training process; returns whether there was something to hurt.

        Kinds: kill, stop, term (signals to the training process), template, host (no answer).
        """
        if kind == "host":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "template":
            return self._template is not None and self._template.kill()
        child = self._child
        if child is None or child.launch.generation != generation:
            return False
        return child.signal(_SIGNALS[kind])

    def stacks(self, timeout_s: float) -> str:
        """Stacks of the training process, below a line that tells its state."""
        child = self._child
        if child is None or child.wait(0):
            return "no training process\n"
        return stacks(child.pid, Path(child.launch.stacks_file), timeout_s)

    def kill(self) -> None:
        """End the training process with SIGKILL and wait until it is gone. Idempotent."""
        with self._one_at_a_time:
            self._end_child()

    def close(self) -> None:
        """End the training process and the template. Idempotent."""
        if self._template is not None and not self._template.can_fork:
            self._template.kill()  # one that is still importing
        with self._one_at_a_time:
            self._end_child()
            if self._template is not None:
                self._template.close()
            if self._held_port is not None:
                self._held_port.close()
            if self._scratch:
                shutil.rmtree(self._scratch, ignore_errors=True)

    def _end_child(self) -> None:
        child = self._child
        if child is not None and not child.wait(0):
            # What it wants to say has no reader any more; it must not keep its end from being told.
            self._mailbox.fence(child.launch.generation + 1)
            child.signal(signal.SIGKILL)
            child.wait(_KILL_S)

    def _guard(self, child: Child) -> None:
        """End the child when nobody has renewed the lease: it may have been given up."""
        while not child.wait(max(0.05, self._lease.left_s())):
            if not self._lease.left_s():
                child.signal(signal.SIGKILL)
                child.wait(_KILL_S)
                return

    def _on_sigterm(self, *_: object) -> None:
        """Say so at the next poll, and stay for what the coordinator wants to save."""
        if not self._is_leaving:
            self._is_leaving = True
            threading.Thread(target=self._leave, name="leave", daemon=True).start()

    def _leave(self) -> None:
        self._mailbox.wake()
        time.sleep(GRACE_S)
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.close()
        os._exit(0)


def _own_node() -> tuple[str, str]:
    """Id and address under which Ray knows this node; loopback outside Ray."""
    if ray.is_initialized():
        here = ray.get_runtime_context().get_node_id()
        for node in ray.nodes():
            if node["NodeID"] == here:
                return here, str(node["NodeManagerAddress"])
    return "", "127.0.0.1"
