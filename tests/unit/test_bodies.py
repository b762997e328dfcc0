"""Bodies within bounds: what comes, what it inflates to, and what all of them may take."""

import asyncio
import gzip
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.bodies import BodyBounds, Incoming, inflate
from serving.body_memory import BodyMemory, Hold
from serving.errors import Overloaded, RefusedRequest

BOUNDS = BodyBounds(100_000, 500_000, 30.0)


def bodies(*parts: bytes, is_stuck: bool = False) -> Any:
    """A server's `receive`."""
    left = list(parts)

    async def receive() -> dict[str, Any]:
        if not left and is_stuck:
            await asyncio.sleep(30)
        part = left.pop(0) if left else b""
        return {"type": "http.request", "body": part, "more_body": bool(left) or is_stuck}

    return receive


async def gathered(incoming: Incoming) -> bytes:
    body = b""
    while True:
        message = await incoming()
        body += message["body"]
        if not message["more_body"]:
            return body


def read(
    *parts: bytes,
    encoding: str = "",
    length: int | None = None,
    bounds: BodyBounds = BOUNDS,
    memory: BodyMemory | None = None,
    is_stuck: bool = False,
) -> bytes:
    async def whole() -> bytes:
        hold = Hold(memory or BodyMemory(), "ana")
        try:
            receive = bodies(*parts, is_stuck=is_stuck)
            return await gathered(Incoming(receive, encoding, length, bounds, hold))
        finally:
            hold.end()

    return asyncio.run(whole())


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("", lambda b: b),
        ("identity", lambda b: b),
        ("gzip", gzip.compress),
        ("X-GZIP ", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", lambda b: zlib.compress(b, wbits=-15)),
    ],
)
@pytest.mark.parametrize("size", [0, 1, 1_000, 400_000])
def test_what_was_sent_is_what_the_route_reads(encoding: str, packed: Any, size: int) -> None:
    body = bytes(index % 251 for index in range(min(size, 90_000))) * (1 if size < 1e5 else 4)
    sent = packed(body[:90_000] if encoding in ("", "identity") else body)
    memory = BodyMemory()
    parts = [sent[start : start + 7_000] for start in range(0, len(sent), 7_000)] or [b""]
    wanted = body[:90_000] if encoding in ("", "identity") else body
    assert read(*parts, encoding=encoding, memory=memory) == wanted
    assert read(*parts, encoding=encoding, memory=memory, length=len(sent)) == wanted
    assert memory.used_bytes == 0


def refused(status: int, *parts: bytes, **options: Any) -> str:
    with pytest.raises(RefusedRequest) as error:
        read(*parts, **options)
    assert error.value.status == status
    return str(error.value)


def test_what_is_too_much_damaged_unknown_or_does_not_come() -> None:
    assert "larger than 100000" in refused(413, b"x" * 60_000, b"x" * 60_000)
    bomb = gzip.compress(bytes(600_000))
    assert "inflates to more than 500000" in refused(413, bomb, encoding="gzip")
    assert read(gzip.compress(bytes(500_000)), encoding="gzip") == bytes(500_000)
    for damaged in (gzip.compress(bytes(1_000))[:-9], b"", b"x" * 50):
        refused(400, damaged, encoding="gzip")
    refused(415, b"{}", encoding="br")
    as_it_is = BodyBounds(100_000, None, None, is_charged=False)
    refused(415, gzip.compress(b"{}"), encoding="gzip", bounds=as_it_is)
    slow = BodyBounds(100_000, 500_000, 0.02)
    assert "did not come within 0.02 s" in refused(408, b"{", bounds=slow, is_stuck=True)


def test_a_body_is_charged_before_it_is_in_memory() -> None:
    memory = BodyMemory(10_000_000, 200_000)
    made = 0

    def take(count: int) -> None:
        nonlocal made
        made += count
        if made > 300_000:
            raise Overloaded("full", 1.0)

    with pytest.raises(Overloaded):
        inflate(gzip.compress(bytes(50_000_000)), "gzip", 10**9, take)
    assert made < 300_000 + 2**21
    for options in (
        {"length": 200_001, "bounds": BodyBounds(10**6, None, None)},
        {"encoding": "gzip"},
    ):
        with pytest.raises(Overloaded, match="200000 at once are allowed"):
            read(gzip.compress(bytes(400_000)), memory=memory, **options)
        assert memory.used_bytes == 0
    small = gzip.compress(b"{}")
    assert read(small, encoding="gzip", memory=BodyMemory(1_000, 1_000)) == b"{}"


def test_what_goes_to_the_disk_is_not_charged() -> None:
    as_it_is = BodyBounds(10**6, None, None, is_charged=False)
    assert len(read(bytes(50_000), bounds=as_it_is, memory=BodyMemory(10, 10))) == 50_000


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 70)), max_size=60))
def test_no_user_and_not_all_together_hold_more_than_they_may(wanted: list[Any]) -> None:
    memory = BodyMemory(100, 60)
    held: dict[str, int] = dict.fromkeys("abc", 0)
    holds = {user: Hold(memory, user) for user in "abc"}
    for user, count in wanted:
        fits = held[user] + count <= 60 and sum(held.values()) + count <= 100
        if fits:
            holds[user].take(count)
            held[user] += count
        else:
            with pytest.raises(Overloaded) as error:
                holds[user].take(count)
            assert (error.value.status, error.value.retry_after_s) == (429, 1.0)
        assert memory.used_bytes == sum(held.values())
    for hold in holds.values():
        hold.end()
        hold.end()
        with pytest.raises(Overloaded):  # a thread that works on for nobody
            hold.take(0)
    assert memory.used_bytes == 0
