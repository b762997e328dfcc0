"""The host: one worker's place in the cluster, alive for the whole run.

A host keeps a template process and at most one training process, forked from it for each
generation. The coordinator draws messages with `poll`; a host that dies breaks its pending `poll`,
so one mechanism carries progress and tells of death. Methods are thread-safe; Ray runs them in a
pool of threads.
"""

import contextlib
import multiprocessing
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import ray

from cluster.channel import Message
from cluster.errors import StartTimeout, TemplateLost
from cluster.template import Launch

_POLL_BATCH = 64
_FORK_TIMEOUT_S = 30.0


class Host:
    """Keeps a template, forks training processes from it, and passes on what they say."""

    def __init__(self, preload: Sequence[str], environment: Mapping[str, str]) -> None:
        self._preload = list(preload)
        self._environment = dict(environment)
        self._messages: queue.Queue[Message] = queue.Queue()
        self._template: subprocess.Popen[bytes] | None = None
        self._descriptors: socket.socket | None = None
        self._listener: threading.Thread | None = None
        self._connection: Connection | None = None
        self._forked: queue.Queue[int] = queue.Queue()
        self._fork_lock = threading.Lock()
        self._child: Connection | None = None
        self._launch: Launch | None = None
        self._pid = 0
        self._exited = threading.Event()
        self._held_port: socket.socket | None = None
        self._address = ""
        self._scratch = ""

    def start(self, timeout_s: float, log_file: str) -> dict[str, Any]:
        """Start the template and wait until it has imported everything.

        Returns:
            `pid` of the host and `node` (its network address).

        Raises:
            StartTimeout: The template did not come up in time.
        """
        ours, theirs = multiprocessing.Pipe()
        self._descriptors, their_descriptors = socket.socketpair()
        passed = [theirs.fileno(), their_descriptors.fileno()]
        os.makedirs(os.path.dirname(log_file), exist_ok=True)
        command = [sys.executable, "-m", "cluster.template", *map(str, passed), *self._preload]
        # What libraries drop in the temporary folder would outlive processes that end by _exit.
        self._scratch = tempfile.mkdtemp(prefix=".scratch-", dir=os.path.dirname(log_file))
        with open(log_file, "ab") as log:
            self._template = subprocess.Popen(
                command,
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment, "TMPDIR": self._scratch},
            )
        theirs.close()
        their_descriptors.close()
        self._connection = ours
        if not self._connection.poll(timeout_s):
            self.close()
            raise StartTimeout(
                f"the template process did not import {', '.join(self._preload)} within "
                f"{timeout_s:g} s. See {log_file}, or raise cluster.start_timeout_s."
            )
        self._address = _own_address()
        try:
            self._connection.recv()
        except EOFError:
            self.close()
            raise StartTimeout(
                f"the template process ended while importing; see {log_file}."
            ) from None
        threading.Thread(target=self._listen_to_template, name="template", daemon=True).start()
        return {"pid": os.getpid(), "node": self._address}

    def has_template(self) -> bool:
        """Whether this host can fork."""
        return self._template is not None and self._template.poll() is None

    def reserve(self) -> str:
        """Hold a free port for the next generation and return `address:port`.

        The port stays bound here; TensorFlow shares it (SO_REUSEPORT), so that no other process can
        take it in between.
        """
        if self._held_port is not None:
            self._held_port.close()
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("", 0))
        self._held_port = held
        return f"{self._address}:{held.getsockname()[1]}"

    def launch(self, launch: Launch) -> int:
        """Fork a training process; returns its process id. An earlier one must have ended."""
        if self._connection is None or self._descriptors is None:
            raise RuntimeError("launch needs a started host")
        with self._fork_lock:
            self._launch, self._pid = launch, 0
            self._exited.clear()
            try:
                self._connection.send(launch)
                return self._forked.get(timeout=_FORK_TIMEOUT_S)
            except (OSError, queue.Empty) as error:
                raise TemplateLost(
                    f"the template of rank {launch.rank} is gone: {error}"
                ) from error

    def send(self, generation: int, command: str, body: Any = None) -> None:
        """Send a command to the training process of a generation; nothing if it has ended."""
        if self._launch is None or self._launch.generation != generation or self._child is None:
            return
        with contextlib.suppress(OSError):
            self._child.send((command, body))

    def poll(self, timeout_s: float) -> list[Message]:
        """Messages since the last call, at most 64; waits up to `timeout_s` for the first."""
        messages: list[Message] = []
        with contextlib.suppress(queue.Empty):
            messages.append(self._messages.get(timeout=timeout_s))
            while len(messages) < _POLL_BATCH:
                messages.append(self._messages.get_nowait())
        return messages

    def kill(self, timeout_s: float = 10.0) -> None:
        """End the training process with SIGKILL and wait until it is gone. Idempotent."""
        if self._pid and not self._exited.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._exited.wait(timeout_s)

    def close(self) -> None:
        """End the training process and the template. Idempotent."""
        self.kill()
        if self._connection is not None and not self._connection.closed:
            with contextlib.suppress(OSError):
                self._connection.send(None)  # the template's cue to end
        if self._descriptors is not None:
            self._descriptors.close()
        if self._template is not None:
            try:
                self._template.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._template.kill()
                self._template.wait(timeout=5)
        if self._held_port is not None:
            self._held_port.close()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _listen_to_template(self) -> None:
        connection = self._connection
        while connection is not None:
            try:
                kind, body = connection.recv()
            except (EOFError, OSError, TypeError):
                self._report_exit(self._pid, -signal.SIGKILL)  # it takes its child along
                return
            if kind == "forked":
                self._adopt(body)
            elif kind == "exited":
                self._report_exit(*body)

    def _adopt(self, pid: int) -> None:
        """Take over the channel of a new child, before anything else of it can be heard."""
        launch, descriptors = self._launch, self._descriptors
        if launch is None or descriptors is None:
            return
        _, handed, _, _ = socket.recv_fds(descriptors, 1, 1)
        self._pid, self._child = pid, Connection(handed[0])
        self._listener = threading.Thread(
            target=self._listen_to_child, args=(self._child, launch), name="child", daemon=True
        )
        self._listener.start()
        self._forked.put(pid)

    def _report_exit(self, pid: int, code: int) -> None:
        launch = self._launch
        if not pid or pid != self._pid or launch is None:
            return
        if self._listener is not None:
            self._listener.join(timeout=10)  # what it said last comes before its end
        self._exited.set()
        self._pid = 0
        self._messages.put(Message(launch.generation, launch.rank, "exited", code))

    def _listen_to_child(self, connection: Connection, launch: Launch) -> None:
        while True:
            try:
                kind, body = connection.recv()
            except (EOFError, OSError):
                return  # its end is reported by the template, with the exit code
            self._messages.put(Message(launch.generation, launch.rank, kind, body))


def _own_address() -> str:
    """The address under which Ray knows this node; loopback outside Ray."""
    if ray.is_initialized():
        here = ray.get_runtime_context().get_node_id()
        for node in ray.nodes():
            if node["NodeID"] == here:
                return str(node["NodeManagerAddress"])
    return "127.0.0.1"
