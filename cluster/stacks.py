"""Stacks: where every thread of a training process is, asked for with a signal.

The process has registered `faulthandler` on SIGUSR1, which writes to a file without the
interpreter's help: it answers from an endless loop in C as well. A stopped process answers when it
is woken.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

_SETTLE_S = 0.2
_STATES = {"R": "running", "S": "sleeping", "D": "waiting for a device", "T": "stopped"}


def stacks(pid: int, file: Path, timeout_s: float) -> str:
    """The stacks of a process, below a line that tells its state before it was asked.

    A stopped process goes on afterwards. Says so where there is nothing to tell: the process is
    gone, has no handler (a signal without one would end it), or did not write in time.
    """
    state = _state(pid)
    if state is None:
        return f"process {pid}: gone\n"
    header = f"process {pid}: {state} ({_STATES.get(state, 'other')})\n"
    if not _has_handler(pid):
        return f"{header}it does not write stacks: it is still starting, or does not train\n"
    before = _size(file)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
        os.kill(pid, signal.SIGCONT)
    if not _wait_until_settled(file, before, timeout_s):
        return f"{header}it wrote no stacks within {timeout_s:g} s\n"
    with open(file, errors="replace") as text:
        text.seek(before)
        return header + text.read()


def was_stopped(text: str) -> bool:
    """Whether what `stacks` told is of a process that a signal had stopped."""
    return text.partition("\n")[0].endswith(f"T ({_STATES['T']})")


def _wait_until_settled(file: Path, before: int, timeout_s: float) -> bool:
    """Wait until the file has grown, and then stopped growing; False if it never grew."""
    deadline = time.monotonic() + timeout_s
    size, grown_at = before, time.monotonic()
    while (now := time.monotonic()) < deadline:
        if (newest := _size(file)) != size:
            size, grown_at = newest, now
        elif size > before and now - grown_at > _SETTLE_S:
            return True
        time.sleep(0.01)
    return size > before


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _state(pid: int) -> str | None:
    """The kernel's letter for a process's state; None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    letter = text.rpartition(")")[2].split()[0]  # the name before it may hold anything
    return None if letter in "ZX" else letter


def _has_handler(pid: int) -> bool:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)
