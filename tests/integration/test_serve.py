"""The whole service as its users and operators meet it: `lockstep serve` on real Ray Serve."""

import contextlib
import json
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from registry.store import Registry
from serving.accounts import Accounts
from tests.support.listening import listening
from tests.support.served import MODEL, Served, divided, prepare, served

pytestmark = pytest.mark.long

BODY = {"instances": [1.0, 2.0, 5.0]}
PREDICT = f"/v1/models/{MODEL}:predict"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def key(folder: Path) -> str:
    return prepare(folder)


@pytest.fixture(scope="module")
def service(folder: Path, key: str) -> Iterator[Served]:
    with served(folder, key, "--predictors", "0") as running:
        yield running


def client(service: Served, **options: Any) -> httpx.Client:
    headers = {"authorization": f"Bearer {service.key}"}
    return httpx.Client(base_url=service.url, headers=headers, timeout=60, **options)


def declared(service: Served, length: int) -> str:
    """What comes back for a body of some length, of which not a byte is sent."""
    host, _, port = service.url.removeprefix("http://").partition(":")
    lines = [
        *(f"POST {PREDICT} HTTP/1.1", f"host: {host}", f"content-length: {length}"),
        *(f"authorization: Bearer {service.key}", "", ""),
    ]
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall("\r\n".join(lines).encode())
        return connection.recv(4_096).decode()


class Asking:
    """Threads that ask until told to stop; remembers what was not answered with 200."""

    def __init__(self, service: Served, threads: int = 4) -> None:
        self.wrong: list[str] = []
        self.seen: list[float] = []
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(service,)) for _ in range(threads)
        ]

    def __enter__(self) -> "Asking":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, service: Served) -> None:
        with client(service) as mine:
            while not self._is_over.is_set():
                try:
                    response = mine.post(PREDICT, json=BODY)
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                    continue
                if response.status_code == 200:
                    self.seen.append(response.json()["predictions"][0])
                else:
                    self.wrong.append(response.text)


def test_it_answers_behind_its_front(service: Served) -> None:
    with client(service) as mine:
        answer = mine.post(PREDICT, json=BODY)
        assert answer.json() == {"predictions": [2.5, 3.0, 4.5]}
        assert answer.headers["x-request-id"]
        assert mine.get("/readyz").json() == {"ready": True}
        assert mine.get("/v1/models", headers={"authorization": ""}).status_code == 401
        assert declared(service, 10 * 2**30).startswith("HTTP/1.1 413")
        assert mine.post(PREDICT, json=BODY).status_code == 200


def members(service: Served) -> dict[str, list[psutil.Process]]:
    """All processes of the service, by what they are; those that left its tree too."""
    home = str(service.folder / "home")
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("LOCKSTEP_HOME") == home:
                words = " ".join(process.cmdline())
                kinds = ("haproxy", "lockstep:online", "raylet", "gcs_server")
                kind = next((kind for kind in kinds if kind in words), "other")
                found.setdefault(kind, []).append(process)
    return found


def test_nothing_but_the_one_port_is_open_beyond_loopback(service: Served) -> None:
    open_to = {
        kind: set().union(*(listening(process) for process in processes))
        for kind, processes in members(service).items()
    }
    for kind in ("haproxy", "lockstep:online", "raylet", "gcs_server"):
        assert open_to[kind] == {"127.0.0.1"}, open_to
    assert open_to["other"] <= {"127.0.0.1", "::1"}, open_to


def test_an_alias_moves_under_load_without_a_failed_request(service: Served) -> None:
    database = service.database()
    registry = Registry(database, str(service.folder / "home" / "artifacts"))
    number = registry.register(MODEL, divided(service.folder, 4.0, "second")).number
    with Asking(service) as asking:
        wait_until(lambda: len(asking.seen) > 20)
        registry.set_alias(MODEL, "champion", number, who="test", why="test")
        wait_until(lambda: asking.seen[-1:] == [2.25])
        registry.rollback(MODEL, who="test", why="test")
        wait_until(lambda: asking.seen[-1:] == [2.5])
    database.close()
    assert asking.wrong == []
    assert set(asking.seen) == {2.5, 2.25}


def test_a_revoked_key_stops_within_two_seconds(service: Served) -> None:
    database = service.database()
    accounts = Accounts(database)
    other = accounts.add("leaving", who="test")
    with client(service) as mine:
        mine.headers["authorization"] = f"Bearer {other}"
        assert mine.post(PREDICT, json=BODY).status_code == 200
        accounts.remove("leaving", who="test")
        time.sleep(2)
        assert mine.post(PREDICT, json=BODY).status_code == 401
    database.close()


def test_a_killed_replica_is_replaced(service: Served) -> None:
    replicas = [
        child
        for child in psutil.Process(service.process.pid).children(recursive=True)
        if "lockstep:online" in " ".join(child.cmdline())
    ]
    assert len(replicas) == 1
    replicas[0].kill()
    with client(service) as mine:
        wait_until(lambda: mine.post(PREDICT, json=BODY).status_code == 200, 90)


def test_requests_and_keys_in_the_logs(service: Served) -> None:
    time.sleep(1.5)
    logs = service.folder / "home" / "service" / "logs"
    text = "".join(path.read_text() for path in logs.glob("*.jsonl*"))
    lines = [json.loads(line) for line in text.splitlines()]
    assert any(line.get("user") == "tester" and line.get("status") == 200 for line in lines)
    assert service.key not in text
    assert service.key.split("_", 2)[2] not in (service.folder / "serve.log").read_text()


def test_it_is_not_ready_from_sigterm_on_and_answers_until_the_end(folder: Path, key: str) -> None:
    settings = folder / "slow_end.yaml"
    settings.write_text("unready_s: 4\n")
    options = ("--predictors", "0", "--config", str(settings))
    with served(folder, key, *options) as running, client(running) as mine:
        assert mine.get("/readyz").status_code == 200
        begin = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: mine.get("/readyz").status_code == 503, 3)
        assert mine.get("/v2/health/ready").json() == {"ready": False}
        assert mine.get("/livez").status_code == 200
        assert mine.post(PREDICT, json=BODY).status_code == 200
        assert running.process.wait(90) == 0
        assert time.monotonic() - begin >= 4
    assert not (folder / "home" / "service" / "ending").exists()


def fronts() -> set[int]:
    return {p.pid for p in psutil.process_iter(["name"]) if p.info["name"] == "haproxy"}


def test_it_ends_with_requests_answered_and_starts_again(folder: Path, key: str) -> None:
    before = fronts()
    for _ in range(2):
        with served(folder, key, "--predictors", "0") as running, Asking(running) as asking:
            wait_until(lambda: len(asking.seen) > 20)
            assert fronts() - before
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(90) == 0
        # A connection that was refused after the end is no answer that was lost half-way.
        assert not [text for text in asking.wrong if "Incomplete" in text or "500" in text]
        wait_until(lambda: fronts() <= before, 10)


def test_tls_by_files(folder: Path, key: str) -> None:
    cert, secret = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(secret), "-out", str(cert), "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    options = ("--predictors", "0", "--tls-cert", str(cert), "--tls-key", str(secret))
    with served(folder, key, *options) as running:
        assert running.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(cert))
        with client(running, verify=trusted) as mine:
            assert mine.post(PREDICT, json=BODY).json() == {"predictions": [2.5, 3.0, 4.5]}
        plain = running.url.replace("https", "http")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{plain}/livez").raise_for_status()


def wait_until(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s")
