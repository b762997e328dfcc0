"""The online half of bench-serving: its load, and what it holds against its bars."""

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks.harness import Row
from benchmarks.serving import ratios_and_targets, requests
from benchmarks.serving_load import load


def rows(lockstep: float, predict: float, compiled: float, empty: float) -> dict[str, Row]:
    names = {
        "Lockstep": lockstep,
        "Ray Serve, model.predict": predict,
        "Ray Serve, compiled function": compiled,
        "empty route, same front": empty,
    }
    many = {
        f"{n}, 64 clients": Row(f"{n}, 64 clients", "requests/s", (v,)) for n, v in names.items()
    }
    one = {f"{n}, 1 client, p50": Row(n, "ms", (1_000 / v,)) for n, v in names.items()}
    return many | one


def test_all_bars_are_held_against_medians() -> None:
    _, targets = ratios_and_targets(rows(1_300, 13, 200, 2_000))
    assert [target.is_met for target in targets] == [True, True, True, True]
    assert targets[0].value == pytest.approx(100)
    assert targets[3].is_limit
    _, targets = ratios_and_targets(rows(500, 13, 200, 2_000))
    assert [target.is_met for target in targets] == [False, False, False, False]


def test_requests_are_whole(tmp_path: Path) -> None:
    for name, file in requests(tmp_path, "lk_x").items():
        head, _, body = file.read_bytes().partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head, name
    one = (tmp_path / "one.request").read_bytes().partition(b"\r\n\r\n")[2]
    assert len(json.loads(one)["instances"]) == 1


def test_the_load_counts_answers_in_pieces_and_wrong_ones() -> None:
    async def scenario() -> None:
        served = 0

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal served
            try:
                while await reader.readexactly(4):
                    served += 1
                    status = b"500 X" if served % 10 == 0 else b"200 OK"
                    writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 4\r\n\r\nab")
                    await writer.drain()
                    writer.write(b"cd")
            except asyncio.IncompleteReadError:
                writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            said = await load(port, 3, 0.1, b"ping")
        assert 0 < said["requests"] <= served  # it warms up first
        # One answer of each of the three clients may be on its way when it ends.
        assert (served - 3) // 10 <= said["wrong"] <= served // 10
        assert 0 < said["p50_ms"] <= said["p99_ms"]

    asyncio.run(scenario())
