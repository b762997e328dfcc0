"""What travels between a host and its training process: messages up, commands down.

The channel is a local socket. Its end is also the training process's lifeline: when the host
closes it or dies, the process ends itself at once. Of itself the process says once a second how far
it is (`mark`), so that somebody can tell who is behind when nothing goes on; and on its way it
strikes itself with the faults that a chaos plan has given it.
"""

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from cluster.bulk import Assembly, split
from cluster.faults import HOST, PHASES, TOLD, Fault, FaultTrigger, strike
from cluster.watch import PULSE_S

CHAOS = "chaos"
"""A command: (rank, fault) that the rank is to do to itself, now or as soon as it trains."""

_STRUCK_WITHIN_S = 10.0  # generous: from the word of a fault to the coordinator's blow


@dataclass(frozen=True)
class Message:
    """A message of one training process, as the coordinator sees it.

    Attributes:
        generation: The formation that sent it; older ones are ignored.
        rank: The sender.
        kind: What it says. The cluster's own: "ready", "finished", "paused", "exception", "exited",
            "pulse", "part", "fault", "leaving".
        body: Plain values.
    """

    generation: int
    rank: int
    kind: str
    body: Any


class Channel:
    """A training process's side: thread-safe `send`, and commands as they arrive.

    Args:
        connection: The socket.
        rank: Own rank.
        generation: The formation this process belongs to.
        faults: What it does to itself on its way.
    """

    def __init__(
        self, connection: Connection, rank: int, generation: int, faults: Sequence[Fault] = ()
    ) -> None:
        self.rank = rank
        self.generation = generation
        self._connection = connection
        self._send_lock = threading.Lock()
        self._arrived = threading.Condition()
        self._commands: list[tuple[str, Any]] = []
        self._trigger = FaultTrigger(faults)
        self._actions = 0
        self._place = "start"
        self._is_leaving = threading.Event()
        threading.Thread(target=self._listen, name="channel", daemon=True).start()
        threading.Thread(target=self._tell, name="pulse", daemon=True).start()

    def send(self, kind: str, body: Any = None) -> None:
        """Send a message to the coordinator; blocks while the host does not read."""
        with self._send_lock:
            self._connection.send((kind, body))

    def send_large(self, kind: str, body: Any) -> None:
        """Send a body of any size, in parts between which other messages may pass.

        By one thread at a time. What the body holds must not change meanwhile.
        """
        for part in split(kind, body):
            self.send("part", part)

    def mark(self, phase: str, step: int = -1) -> None:
        """Say where this process is: before everything that all ranks do together.

        Args:
            phase: What begins; chaos plans name those of `cluster.faults.PHASES`.
            step: In the phase "step" the last step about to be taken, else the steps completed.
        """
        self._actions += 1
        self._place = phase if step < 0 else f"{phase} {step}"
        fault = self._trigger.reached(phase, step) if phase in PHASES else None
        if fault is not None:
            self.send("fault", fault)
            if fault.kind == HOST:
                time.sleep(_STRUCK_WITHIN_S)  # this process ends with the host
            elif fault.kind not in TOLD:
                strike(fault.kind)

    def heed_sigterm(self) -> None:
        """Have SIGTERM tell the coordinator that this process is to go; in the main thread.

        To be called again after a library has put a handler of its own in this one's place.
        """
        signal.signal(signal.SIGTERM, lambda *_: self._is_leaving.set())

    def has_command(self, command: str) -> bool:
        """Whether a command of this kind has arrived."""
        with self._arrived:
            return any(kind == command for kind, _ in self._commands)

    def wait_for(self, command: str, timeout_s: float) -> bool:
        """Wait for a command; returns False when it did not arrive in time."""
        with self._arrived:
            return self._arrived.wait_for(
                lambda: any(kind == command for kind, _ in self._commands), timeout_s
            )

    def take(self, command: str, timeout_s: float) -> Any:
        """The body of a command, waited for, and forgotten here.

        Raises:
            TimeoutError: It did not arrive in time.
        """
        if not self.wait_for(command, timeout_s):
            raise TimeoutError(f"the coordinator sent no {command} within {timeout_s:g} s.")
        with self._arrived:
            index = [kind for kind, _ in self._commands].index(command)
            return self._commands.pop(index)[1]

    def _listen(self) -> None:
        assembly = Assembly()
        while True:
            try:
                command = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)  # the host is gone: nobody is left to work for
            if command[0] == "part":
                whole = assembly.add(command[1])
                if whole is None:
                    continue
                command = whole
            if command[0] == CHAOS:
                self._suffer(*command[1])
                continue
            with self._arrived:
                self._commands.append(command)
                self._arrived.notify_all()

    def _suffer(self, rank: int, fault: Fault) -> None:
        if rank != self.rank:
            return
        if fault.kind == "raise":  # in the thread that trains, at its next mark
            self._trigger.order(fault)
        else:
            strike(fault.kind)

    def _tell(self) -> None:
        """Tell how far this process is, and once if it is to leave."""
        has_said = False
        while True:
            if has_said:
                time.sleep(PULSE_S)
            elif self._is_leaving.wait(PULSE_S):
                has_said = True
                self.send("leaving")
            self.send("pulse", (self._actions, self._place))
