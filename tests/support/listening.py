"""Where processes listen."""

import contextlib

import psutil


def listening(process: psutil.Process) -> set[str]:
    """Addresses that a process listens on by TCP; none where it has gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {
            connection.laddr.ip.removeprefix("::ffff:")
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
    return set()
