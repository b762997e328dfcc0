"""Lifelines: whose end is told, and what is no end."""

import socket
import time

from cluster.lifeline import Beacon, Lifelines


def broken(lines: Lifelines[str]) -> list[str]:
    """Whose lines end within a moment: loopback tells without delay, but not at once."""
    deadline = time.monotonic() + 0.2
    found: list[str] = []
    while time.monotonic() < deadline and not found:
        found = lines.broken()
    return found


def test_an_ended_process_is_told_and_a_living_one_is_not() -> None:
    living = Beacon("127.0.0.1")
    lines: Lifelines[str] = Lifelines()
    with socket.create_server(("127.0.0.1", 0)) as ending:
        lines.connect("living", "127.0.0.1", living.port)
        lines.connect("ending", "127.0.0.1", ending.getsockname()[1])
        held, _ = ending.accept()
        assert broken(lines) == []
        held.close()
    assert broken(lines) == ["ending"]
    assert broken(lines) == []
    lines.close()


def test_what_cannot_be_reached_is_not_called_ended() -> None:
    lines: Lifelines[str] = Lifelines()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    lines.connect("refused", "127.0.0.1", port)
    assert broken(lines) == []
    lines.close()


def test_a_dropped_line_tells_nothing() -> None:
    lines: Lifelines[str] = Lifelines()
    with socket.create_server(("127.0.0.1", 0)) as ending:
        lines.connect("host", "127.0.0.1", ending.getsockname()[1])
        held, _ = ending.accept()
        lines.drop("host")
        held.close()
    assert broken(lines) == []
