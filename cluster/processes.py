"""The processes of a host as it sees them: its template, and what the template has forked.

A template is started by exec, a child is adopted with the channel that the template hands up for
it. How both end, and in which order that is heard, is settled here; when, by the host.
"""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from cluster.channel import Message
from cluster.errors import StartTimeout, TemplateLost
from cluster.mailbox import Mailbox
from cluster.template import Launch

_FORK_TIMEOUT_S = 30.0
_LAST_WORDS_S = 10.0


class Child:
    """A training process: takes commands in their order, and puts what it says into a mailbox."""

    def __init__(self, pid: int, connection: Connection, launch: Launch, mailbox: Mailbox) -> None:
        self.pid = pid
        self.launch = launch
        self._connection = connection
        self._mailbox = mailbox
        self._exited = threading.Event()
        self._lock = threading.Lock()
        self._early: dict[int, tuple[str, Any]] = {}
        self._next_number = 0
        # A stopped process reads nothing: it is the writer that waits for it, not the host.
        self._outgoing: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, name="listener", daemon=True)
        self._listener.start()
        threading.Thread(target=self._write, name="writer", daemon=True).start()

    def send(self, number: int, command: str, body: Any) -> None:
        """Pass a command on after all with lower numbers, which count from 0. Never blocks."""
        with self._lock:
            self._early[number] = (command, body)
            while self._next_number in self._early:
                self._outgoing.put(self._early.pop(self._next_number))
                self._next_number += 1

    def signal(self, number: int) -> bool:
        """Send a signal; returns False when the process has ended."""
        with self._lock:
            if self._exited.is_set():
                return False
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
                return True
            return False

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the process; returns whether it has come."""
        return self._exited.wait(timeout_s)

    def ended(self, code: int) -> None:
        """Told by the template: the process has ended. Its last words are heard first."""
        with self._lock:
            self._exited.set()
        self._outgoing.put(None)
        self._listener.join(_LAST_WORDS_S)
        self._mailbox.put(Message(self.launch.generation, self.launch.rank, "exited", code), 0)

    def _listen(self) -> None:
        while True:
            try:
                data = self._connection.recv_bytes()
            except (EOFError, OSError):
                return  # its end is reported by the template, with the exit code
            kind, body = pickle.loads(data)
            message = Message(self.launch.generation, self.launch.rank, kind, body)
            self._mailbox.put(message, len(data))

    def _write(self) -> None:
        while (command := self._outgoing.get()) is not None:
            try:
                self._connection.send(command)
            except OSError:
                return


class TemplateProcess:
    """One template, from its start to its end. `fork` is called by one thread at a time."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._connection, self._theirs = multiprocessing.Pipe()
        self._descriptors, self._their_descriptors = socket.socketpair()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._ended = threading.Event()
        self._launch: Launch | None = None
        self._forked: queue.Queue[Child] = queue.Queue()
        self._child: Child | None = None

    def start(
        self,
        preload: Sequence[str],
        environment: Mapping[str, str],
        log_file: str,
        timeout_s: float,
    ) -> None:
        """Start the process and wait until it has imported everything.

        Raises:
            StartTimeout: It did not come up in time.
        """
        passed = [self._theirs.fileno(), self._their_descriptors.fileno()]
        command = [sys.executable, "-m", "cluster.template", *map(str, passed), *preload]
        with open(log_file, "ab") as log:
            self._process = subprocess.Popen(
                command,
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
            )
        self._theirs.close()
        self._their_descriptors.close()
        try:
            if not self._connection.poll(timeout_s):
                raise StartTimeout(
                    f"the template process did not import {', '.join(preload)} within "
                    f"{timeout_s:g} s. See {log_file}, or raise cluster.start_timeout_s."
                )
            self._connection.recv()
        except (EOFError, OSError):
            raise StartTimeout(
                f"the template process ended while importing; see {log_file}."
            ) from None
        self._is_ready = True
        threading.Thread(target=self._listen, name="template", daemon=True).start()

    @property
    def can_fork(self) -> bool:
        """Whether it has come up and not ended."""
        return self._is_ready and not self._ended.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the process; returns whether it has come."""
        return self._ended.wait(timeout_s)

    def fork(self, launch: Launch) -> Child:
        """Fork a training process.

        Raises:
            TemplateLost: The template has ended, or does not answer.
        """
        self._launch = launch
        try:
            self._connection.send(launch)
            return self._forked.get(timeout=_FORK_TIMEOUT_S)
        except (OSError, queue.Empty) as error:
            raise TemplateLost(f"the template of rank {launch.rank} is gone: {error}") from error

    def kill(self) -> bool:
        """Send SIGKILL; returns False when there is no process. Its children go along."""
        if self._process is None or self._process.poll() is not None:
            return False
        self._process.kill()
        return True

    def close(self) -> None:
        """End the process and wait for it. Idempotent."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            self._connection.send(None)  # the template's cue to end
        self._descriptors.close()
        try:
            self._process.wait(timeout=5 if self._is_ready else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=5)

    def _listen(self) -> None:
        while True:
            try:
                kind, body = self._connection.recv()
            except (EOFError, OSError):
                self._ended.set()
                if self._child is not None and not self._child.wait(0):
                    self._child.ended(-signal.SIGKILL)  # it goes along with its template
                return
            if kind == "forked":
                self._adopt(body)
            elif self._child is not None and body[0] == self._child.pid:
                self._child.ended(body[1])

    def _adopt(self, pid: int) -> None:
        """Take over the channel of a new child, before anything else of it can be heard."""
        launch = self._launch
        if launch is None:
            return
        _, handed, _, _ = socket.recv_fds(self._descriptors, 1, 1)
        self._child = Child(pid, Connection(handed[0]), launch, self._mailbox)
        self._forked.put(self._child)
