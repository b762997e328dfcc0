"""Who owns the dispatching: a name that tells, on the same machine, whether its process lives."""

import os
import socket
from pathlib import Path


def holder_name() -> str:
    """This process, so that others on the machine can tell when it is gone."""
    return f"{socket.gethostname()} {os.getpid()} {_started(os.getpid())}"


def is_dead(holder: str) -> bool:
    """Whether the process that called itself so is known to be gone: one of this machine."""
    host, _, rest = holder.partition(" ")
    pid, _, started = rest.partition(" ")
    return host == socket.gethostname() and pid.isdigit() and _started(int(pid)) != started


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
