"""Who owns the dispatching: a name that tells, on the same machine, whether its process lives."""

import os
import secrets
import socket
from pathlib import Path


def holder_name() -> str:
    """A loop of this process, so that others on the machine can tell when the process is gone."""
    return " ".join(
        [socket.gethostname(), str(os.getpid()), _started(os.getpid()), secrets.token_hex(4)]
    )


def is_dead(holder: str) -> bool:
    """Whether the process of a holder is known to be gone: it was one of this machine."""
    host, pid, started, *_ = [*holder.split(" "), "", "", ""]
    return host == socket.gethostname() and pid.isdigit() and _started(int(pid)) != started


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
