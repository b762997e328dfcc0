"""Webhooks: what is posted, how often, and that nothing of it hurts or tells a secret."""

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from configs.pipeline import WebhookConfig
from lockstep.webhooks import post_webhook

SECRET = "s3cr3t"


class Receiver(ThreadingHTTPServer):
    """Answers with the given statuses, the last one for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses = [200]
        self.headers_out: dict[str, str] = {}
        self.received: list[tuple[str, dict[str, str], Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook/{SECRET}"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(text, parse_constant=lambda name: f"{name}, which is no JSON")
        self.server.received.append((self.path, dict(self.headers), body))
        count = min(len(self.server.received), len(self.server.statuses))
        self.send_response(self.server.statuses[count - 1])
        for name, value in self.server.headers_out.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def post(
    hook: dict[str, Any], environment: dict[str, str] | None = None
) -> tuple[str, list[float]]:
    """What went wrong, and the waits."""
    waits: list[float] = []
    config = WebhookConfig.model_validate(hook)
    problem = post_webhook(config, {"decision": "kept"}, environment or {}, waits.append)
    assert SECRET not in problem
    return problem, waits


def test_a_json_object_is_posted_with_headers_from_the_environment(receiver: Receiver) -> None:
    hook = {"url": receiver.url, "headers_from": {"Authorization": "TOKEN"}}
    assert post(hook, {"TOKEN": f"Bearer {SECRET}"}) == ("", [])
    ((path, headers, body),) = receiver.received
    assert path == f"/hook/{SECRET}"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert headers["Content-Type"] == "application/json"
    assert body == {"decision": "kept"}


def test_numbers_that_json_does_not_have_are_null(receiver: Receiver) -> None:
    body = {"metrics": {"mae": math.nan, "r2": -math.inf, "mse": 0.5}, "reasons": (math.inf, "no")}
    hook = WebhookConfig.model_validate({"url": receiver.url})
    assert post_webhook(hook, body) == ""
    ((_, _, received),) = receiver.received
    assert received == {"metrics": {"mae": None, "r2": None, "mse": 0.5}, "reasons": [None, "no"]}


def test_the_address_itself_can_be_a_secret(receiver: Receiver) -> None:
    assert post({"url_from": "HOOK"}, {"HOOK": receiver.url})[0] == ""
    assert "has no HOOK" in post({"url_from": "HOOK"})[0]
    assert "none of http://" in post({"url_from": "HOOK"}, {"HOOK": "file:///etc/passwd"})[0]


def test_a_missing_secret_is_named_and_nothing_is_posted(receiver: Receiver) -> None:
    hook = {"url": receiver.url, "headers_from": {"Authorization": "TOKEN"}}
    assert "the environment has no TOKEN" in post(hook)[0]
    assert receiver.received == []


def test_a_receiver_in_trouble_is_asked_again_with_growing_waits(receiver: Receiver) -> None:
    receiver.statuses = [503, 429, 200]
    assert post({"url": receiver.url}) == ("", [1.0, 2.0])
    receiver.statuses = [500]
    problem, waits = post({"url": receiver.url, "attempts": 4})
    assert problem == "the webhook at http://127.0.0.1 was not told: it answered 500."
    assert waits == [1.0, 2.0, 4.0]


def test_a_receiver_that_refuses_is_not_asked_again(receiver: Receiver) -> None:
    receiver.statuses = [404]
    problem, waits = post({"url": receiver.url})
    assert "it answered 404" in problem
    assert waits == []
    assert len(receiver.received) == 1


def test_redirects_are_not_followed(receiver: Receiver) -> None:
    receiver.statuses = [302]
    receiver.headers_out = {"Location": receiver.url + "/elsewhere"}
    assert "it answered 302" in post({"url": receiver.url})[0]
    assert len(receiver.received) == 1


def test_who_is_not_there_or_says_nothing_costs_bounded_time() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/{SECRET}"
        problem, waits = post({"url": url, "timeout_s": 0.1, "attempts": 2})
    assert "cannot be reached (TimeoutError)" in problem
    assert waits == [1.0]
    assert "cannot be reached (ConnectionRefusedError)" in post({"url": url, "attempts": 1})[0]


def test_what_is_no_header_is_told_without_its_value(receiver: Receiver) -> None:
    hook = {"url": receiver.url, "headers_from": {"Authorization": "TOKEN"}}
    problem, _ = post(hook, {"TOKEN": f"{SECRET}\nX: y"})
    assert "not valid HTTP" in problem
