"""A scheduled run as a process that outlives the scheduler, and can be found again.

The run is the child of a small shell, which leads a process group of its own and writes down its
number before, and the exit status after the run. So a scheduler that was killed, or another one in
its place, can tell a run that goes on from one that ended, and how it ended, though it is not its
child. What the run prints goes to a file.

Beside the log, `<name>.pid` and `<name>.status` hold these two numbers.
"""

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_SHELL = """
trap : HUP INT TERM
echo $$ > "$0.pid.new" && mv "$0.pid.new" "$0.pid"
"$@"
status=$?
echo $status > "$0.status.new" && mv "$0.status.new" "$0.status"
exit $status
"""
"""The trap: the shell outlives the signals that its group gets, and lets the run answer them."""

_FIRST_NUMBERING = 0xEFFFFFFC
"""Linux's name of the numbering of processes that a machine starts with."""

LOST = -1
"""Status of a run that ended without one: it was killed together with its shell."""


@dataclass(frozen=True)
class ProcessName:
    """A process of this machine, never another one that gets its number later.

    Attributes:
        pid: Its number.
        started: When it was started, as the system tells it, and in which boot.
    """

    pid: int
    started: str


def host_name() -> str:
    """Names this machine; inside a container that counts processes of its own, the container too.

    Numbers of processes mean something to who has the same name alone.
    """
    try:
        numbering = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return socket.gethostname()
    is_machines = numbering == _FIRST_NUMBERING
    return socket.gethostname() if is_machines else f"{socket.gethostname()}/{numbering}"


def process_name(pid: int) -> ProcessName | None:
    """Name of a process that lives; None where there is none of this number."""
    started = _started(pid)
    return None if started is None else ProcessName(pid, started)


def is_alive(process: ProcessName) -> bool:
    """Whether this very process lives."""
    return process_name(process.pid) == process


class RunProcess:
    """A run that was started, by this process or by another one."""

    def __init__(
        self, log: Path, process: ProcessName, popen: subprocess.Popen[bytes] | None = None
    ) -> None:
        self._log = log
        self._popen = popen
        self.process = process

    @staticmethod
    def clear(log: Path) -> None:
        """Take back what an earlier run with this log has left. Before a start."""
        for kind in ("pid", "status"):
            log.with_suffix(f".{kind}").unlink(missing_ok=True)

    @classmethod
    def start(cls, command: Sequence[str], log: Path, on_end: Callable[[], None]) -> "RunProcess":
        """Start a run; `on_end` is called from another thread when it has ended.

        Raises:
            OSError: It cannot be started, or the log not be written.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            popen = subprocess.Popen(
                ["/bin/sh", "-c", _SHELL, str(log.with_suffix("")), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        name = process_name(popen.pid) or ProcessName(popen.pid, "")  # it may have ended already

        def wait() -> None:
            popen.wait()
            on_end()

        threading.Thread(target=wait, name=f"run-{popen.pid}", daemon=True).start()
        return cls(log, name, popen)

    @classmethod
    def find(cls, log: Path, process: ProcessName | None) -> "RunProcess | None":
        """A run of an earlier scheduler, ended or not; None where it was never started."""
        if process is not None:
            return cls(log, process)
        pid = _number_in(log.with_suffix(".pid"))
        if pid is None:
            return None
        # Who wrote its number down and has no status yet still holds the number, or was killed.
        return cls(log, process_name(pid) or ProcessName(pid, ""))

    @property
    def is_mine(self) -> bool:
        """Whether its end is told by `on_end`."""
        return self._popen is not None

    def poll(self) -> int | None:
        """Its exit status; `LOST` where it has none, None while it goes on."""
        if self._popen is not None:
            status = self._popen.poll()
            if status is None:
                return None
            if status < 0:  # the shell was killed, and maybe it alone
                self.signal(signal.SIGKILL)
                return LOST
            return status
        if is_alive(self.process):
            return None
        status = _number_in(self._log.with_suffix(".status"))
        return LOST if status is None else status

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the run."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _started(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _started_by_ps(pid)
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] in "ZX" else f"{fields[19]} {boot}"


def _started_by_ps(pid: int) -> str | None:
    """Where there is no /proc."""
    found = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    state, _, started = found.stdout.strip().partition(" ")
    return None if not started or state.startswith("Z") else started.strip()
