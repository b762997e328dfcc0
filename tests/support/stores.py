"""Object stores for tests: one in memory, one that speaks S3, and one that only fails.

Run as a module, this file is the server of the second: it prints its address and ends with its
standard input, so that it cannot outlive the tests.
"""

import contextlib
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from data_pipeline import object_stores
from data_pipeline.object_stores import Store

START_S = 60
STOP_S = 20


def forget_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that says nothing of stores."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "LOCKSTEP_STORAGE_")):
            monkeypatch.delenv(name)


class MemoryStores:
    """Takes the place of all stores; a bucket is a folder of one file system in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forget_stores(monkeypatch)
        self.system = fs._MockFileSystem()
        monkeypatch.setattr(object_stores, "_connect", self._connect)

    def _connect(self, process: int, scheme: str, authority: str, options: Any) -> Store:
        return Store(self.system, f"{scheme}://{authority}", authority)

    def put(self, uri: str, data: bytes) -> str:
        """An object, and the folders that its name has; returns the URI."""
        inner = uri.partition("://")[2]
        self.system.create_dir(inner.rpartition("/")[0], recursive=True)
        with self.system.open_output_stream(inner, compression=None) as out:
            out.write(data)
        return uri

    def make_folder(self, uri: str) -> None:
        """A folder, which real stores do not need."""
        self.system.create_dir(uri.partition("://")[2], recursive=True)

    def copy(self, folder: Path, uri: str) -> None:
        """All files below a folder, hidden ones too."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{uri}/{file.relative_to(folder).as_posix()}", file.read_bytes())


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """An S3 store on this machine, empty and without access control; gives its address."""
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "unused", "AWS_SECRET_ACCESS_KEY": "unused"}
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], START_S)
            address = process.stdout.readline().decode().strip() if ready else ""
            assert address.startswith("http://"), f"moto did not start within {START_S} s"
            yield address
        finally:
            process.stdin.close()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


class FailingStore:
    """Answers every request with one status, or not at all; counts them."""

    def __init__(self, status: int | None) -> None:
        self.requests = 0
        self._status = status
        self._end = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = False
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> "FailingStore":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        store = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                store.requests += 1
                if store._status is None:
                    store._end.wait(60)
                    self.close_connection = True
                    return
                self.send_response(store._status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _serve() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    sys.stdout.write(f"http://{host}:{port}\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    _serve()
