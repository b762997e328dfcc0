"""`lockstep batches` against a real server on loopback."""

import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.responses import JSONResponse
from typer.testing import CliRunner

from configs.errors import UserError
from lockstep.batch_client import BatchClient, ServiceFailure, read_key
from lockstep.cli import app
from serving.batch_routes import batch_routers
from tests.support.batches import Place, expected, rows


def front_of(place):
    """The routes behind as little as they need; the real front has tests of its own."""

    def authenticate(request):
        return place.accounts.authenticate(request.headers["authorization"].split()[1])

    async def refuse(request, error):
        status = getattr(error, "status", 400)
        return JSONResponse({"error": str(error)}, status)

    front = FastAPI()
    front.add_exception_handler(UserError, refuse)
    for router in batch_routers(place.service, authenticate):
        front.include_router(router)
    return front


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A place whose service listens on loopback and whose loop runs."""
    place = Place(tmp_path_factory.mktemp("server") / "place")
    listening = socket.create_server(("127.0.0.1", 0))
    place.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    config = uvicorn.Config(front_of(place), log_level="warning", lifespan="off", ws="none")
    front = uvicorn.Server(config)
    stop = threading.Event()
    threads = [
        threading.Thread(target=front.run, args=([listening],)),
        threading.Thread(target=place.runner.run, args=(stop, 0.0)),
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while not front.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield place
    front.should_exit = True
    stop.set()
    for thread in threads:
        thread.join(20)
    listening.close()
    place.close()


@pytest.fixture
def run(server, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_API_KEY", server.keys["ada"])
    monkeypatch.setenv("LOCKSTEP_SERVER", server.url)

    def call(*arguments, status=0):
        result = CliRunner().invoke(app, ["batches", *map(str, arguments)])
        assert result.exit_code == status, (result.output, result.exception)
        return result.output if result.exception is None or status else result.output

    return call


def test_a_file_here_becomes_predictions_here(server, run, tmp_path):
    table = rows(300)
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    arguments = ("submit", "fake@champion", path, "--wait", "--json", "--idempotency-key", "k")
    job = json.loads(run(*arguments))
    assert (job["status"], job["request_counts"]["total"]) == ("completed", 300)
    told = json.loads(run("download", job["id"], "--output", tmp_path / "out", "--json"))
    parts = [tmp_path / "out" / part["name"] for part in told["manifest"]["parts"]]
    values = np.concatenate([pq.read_table(part)["prediction"].to_numpy() for part in parts])
    np.testing.assert_allclose(values, expected(table), rtol=1e-6)
    assert (tmp_path / "out/_SUCCESS").exists()
    assert "300 of 300 rows" in run("status", job["id"])
    assert job["id"] in run("list", "--json")
    assert "completed" in run("cancel", job["id"])
    result = CliRunner().invoke(
        app, ["batches", "download", job["id"], "--output", str(tmp_path / "out")]
    )
    assert isinstance(result.exception, UserError)


def test_a_job_that_fails_says_why_and_ends_with_a_status(server, run, tmp_path):
    path = server.write(rows(10).drop_columns("b"), "bad.parquet")
    text = run("submit", "fake", path, "--on-server", "--wait", status=3)
    assert "missing_column" in text
    assert "has no column 'b'" in text


def test_mistakes_are_told(server, run, tmp_path):
    for arguments, message in (
        (("status", "batch_x"), "404"),
        (("submit", "fake", tmp_path / "nothing"), "no file at"),
        (("submit", "fake", "/etc/x.csv", "--on-server"), "not in a location"),
        (("submit", "fakee", "file-1"), "fake"),
        (("status", "x", "--server", "ftp://x"), "http://HOST:PORT"),
        (("status", "x", "--key-file", tmp_path / "no"), "cannot read the key"),
    ):
        result = CliRunner().invoke(app, ["batches", *map(str, arguments)])
        assert isinstance(result.exception, UserError), result.output
        assert message in str(result.exception)


def test_a_key_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCKSTEP_API_KEY", raising=False)
    with pytest.raises(UserError, match="LOCKSTEP_API_KEY"):
        read_key(None)
    (tmp_path / "key").write_text("lk_1\n")
    assert read_key(tmp_path / "key") == "lk_1"


class Script:
    """A server that answers as it is told, and notes what it was sent."""

    def __init__(self, *answers):
        self.seen, answers = [], list(answers)
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.rfile.read(int(self.headers.get("content-length", 0)))
                script.seen.append((self.path, dict(self.headers)))
                status, headers, body = answers.pop(0)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def test_a_submission_is_sent_again_under_the_same_key():
    busy = (503, {"retry-after": "3"}, b'{"error": "draining"}')
    slept = []
    with Script(busy, busy, (201, {}, b'{"id": "batch_1"}')) as script:
        client = BatchClient(script.url, "lk_1", slept.append)
        assert client.submit({"model": "m"})["id"] == "batch_1"
    keys = {headers["Idempotency-Key"] for _, headers in script.seen}
    assert (len(script.seen), len(keys), slept) == (3, 1, [3.0, 3.0])


def test_a_long_wait_and_a_silent_server_are_given_up():
    with Script((429, {"retry-after": "3600"}, b'{"error": "rows_per_day"}')) as script:
        client = BatchClient(script.url, "lk_1", lambda _: None)
        with pytest.raises(ServiceFailure, match="rows_per_day"):
            client.submit({})
    with pytest.raises(ServiceFailure, match="does not answer"):
        client.job("batch_1")


def test_a_key_follows_no_redirect():
    with Script() as other, Script((302, {"location": other.url}, b"{}")) as script:
        client = BatchClient(script.url, "lk_1", lambda _: None)
        with pytest.raises(UserError, match="302"):
            client.job("batch_1")
        assert other.seen == []


def test_a_part_that_is_not_what_the_manifest_says_leaves_nothing(tmp_path):
    entry = {"name": "parts/part-00000.parquet", "sha256": "0" * 64}
    manifest = {"parts": [entry], "errors": [], "is_complete": True}
    answers = [(200, {}, json.dumps(manifest).encode()), *[(200, {}, b"other")] * 4]
    with Script(*answers) as script:
        client = BatchClient(script.url, "lk_1", lambda _: None)
        with pytest.raises(ServiceFailure, match="did not arrive"):
            client.download("batch_1", tmp_path / "out")
    assert os.listdir(tmp_path) == []
    manifest["parts"][0]["name"] = "../evil"
    with Script((200, {}, json.dumps(manifest).encode())) as script:
        client = BatchClient(script.url, "lk_1", lambda _: None)
        with pytest.raises(ServiceFailure, match="no part"):
            client.download("batch_1", tmp_path / "out")
    assert not Path(tmp_path, "evil").exists()
