"""Who is at work on a folder: a process by its mark, and whether it is still there.

A mark names a process for good: its number alone is given to others later. Of a process on another
machine, or in another container, nobody here can tell whether it lives; there only time helps.
"""

import os
from pathlib import Path


def own_mark() -> str:
    """The mark of this process."""
    return f"{_realm()} {os.getpid()} {_started(os.getpid())}"


def is_gone(mark: str) -> bool:
    """Whether this process ended for certain. False where that cannot be told from here."""
    realm, number, started = mark.rsplit(" ", 2)
    return realm != "" and realm == _realm() and _started(int(number)) != started


def _realm() -> str:
    """This start of this machine, and the processes that are seen from here."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""  # no Linux: nothing can be told


def _started(process: int) -> str:
    """When a process began, in the kernel's ticks; empty where there is none."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in ("Z", "X") else fields[19]
