"""The template: a clean process that has imported the heavy packages and forks training processes.

Run by a host as `python -m cluster.template FD FD MODULE...` with its ends of two sockets: one for
requests and replies, one over which the channels of new children are handed up. It never
runs an eager operation, opens no port and touches no device, so its forks start as fresh processes
do, without the seconds of import. It forks on its main thread, which lives as long as it does: the
kernel's death signal of its children follows that thread.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import os
import selectors
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from cluster.channel import Channel
from cluster.faults import Fault
from configs.errors import UserError

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Launch:
    """One training process to fork.

    Attributes:
        generation: Number of the formation.
        rank: Rank in it.
        addresses: `host:port` of every rank.
        entry: `module:function`, called with (Channel, Launch).
        payload: Plain values for the entry.
        log_file: Receives standard output and error, appended.
        faults: What a chaos plan has this process do to itself.
        stacks_file: Receives the stacks of all threads on SIGUSR1; named by the host.
    """

    generation: int
    rank: int
    addresses: tuple[str, ...]
    entry: str
    payload: Any
    log_file: str
    faults: tuple[Fault, ...] = ()
    stacks_file: str = ""


def resolve(name: str) -> Any:
    """The object that `module:attribute` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def main() -> None:
    """Import, say so, then fork on request until the host is gone."""
    connection = Connection(int(sys.argv[1]))
    descriptors = socket.socket(fileno=int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the coordinator, not us
    os.setsid()
    for module in sys.argv[3:]:
        importlib.import_module(module)
    connection.send(("ready", os.getpid()))
    _Forker(connection, descriptors).serve()


class _Forker:
    """Serves fork requests and reports the ends of children."""

    def __init__(self, connection: Connection, descriptors: socket.socket) -> None:
        self._connection = connection
        self._descriptors = descriptors
        self._children: set[int] = set()
        self._wake_reader, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)

    def serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                try:
                    if self._wake_reader in ready:
                        self._reap()
                    if self._connection in ready:
                        launch = self._connection.recv()
                        if launch is None:
                            break
                        self._fork(launch)
                except (EOFError, OSError):
                    break
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(0)

    def _fork(self, launch: Launch) -> None:
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._connection.close()
            self._descriptors.close()
            ours.close()
            _become_worker(launch, theirs, parent)
        theirs.close()
        self._children.add(pid)
        self._connection.send(("forked", pid))
        socket.send_fds(self._descriptors, [b"c"], [ours.fileno()])
        ours.close()

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_reader, 4096)
        for pid in list(self._children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self._children.discard(pid)
                self._connection.send(("exited", (pid, os.waitstatus_to_exitcode(status))))


def _become_worker(launch: Launch, theirs: socket.socket, parent: int) -> None:
    """The forked child's whole life; never returns."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _redirect_output(launch.log_file)
        faulthandler.enable()
        if launch.stacks_file:
            stacks = os.open(launch.stacks_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            faulthandler.register(signal.SIGUSR1, stacks)
        connection = Connection(theirs.detach())
        channel = Channel(connection, launch.rank, launch.generation, launch.faults)
        channel.heed_sigterm()
        code = _run_entry(channel, launch)
    finally:
        with contextlib.suppress(OSError):  # the disk of the log may be full
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run_entry(channel: Channel, launch: Launch) -> int:
    try:
        resolve(launch.entry)(channel, launch)
    except Exception as error:  # the process's main: everything is reported, nothing is lost
        text = traceback.format_exc()
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)
        body = {
            "error": f"{type(error).__name__}: {error}",
            "message": str(error),
            "traceback": getattr(error, "traceback", ""),
            "full_traceback": text,
            "is_user_error": isinstance(error, UserError),
        }
        with contextlib.suppress(OSError):
            channel.send("exception", body)
        return 1
    return 0


def _redirect_output(path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


if __name__ == "__main__":
    main()
