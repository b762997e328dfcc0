"""Requests become batches: what waits is taken, users take turns, nobody's absence is computed."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from serving.errors import DeadlineExceeded, Overloaded, PredictionFailure
from serving.lane import BatchFacts, Lane, LaneLimits

LATER = 1e12


def rows(*values: float) -> Any:
    return np.array(values, np.float32).reshape(-1, 1)


class Model:
    """Doubles; waits for leave before each batch; remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.leave = threading.Semaphore(0)
        self.began = threading.Semaphore(0)

    def __call__(self, inputs: Any) -> Any:
        self.began.release()
        assert self.leave.acquire(timeout=10)
        self.batches.append(inputs[:, 0].tolist())
        if (inputs == 13).any():
            raise ValueError("thirteen")
        return inputs * 2


def run(
    scenario: Callable[[Lane, Model], Coroutine[Any, Any, None]], **limits: int
) -> list[BatchFacts]:
    facts: list[BatchFacts] = []
    model = Model()
    lane = Lane("m/1", model, LaneLimits(**limits), facts.append)

    async def bounded() -> None:
        async with asyncio.timeout(10):
            await scenario(lane, model)

    try:
        asyncio.run(bounded())
    finally:
        model.leave.release(1000)
        lane.close()
        assert lane.join(10)
    return facts


async def busy(lane: Lane, model: Model) -> "asyncio.Task[Any]":
    """A request that the thread is at work on."""
    first = asyncio.create_task(lane.predict(rows(0), "first", LATER))
    await asyncio.to_thread(model.began.acquire)
    return first


async def send(lane: Lane, value: float, user: str = "u") -> "asyncio.Task[Any]":
    task = asyncio.create_task(lane.predict(rows(value), user, LATER))
    await asyncio.sleep(0)
    return task


def test_a_lone_request_is_computed_at_once() -> None:
    async def scenario(lane: Lane, model: Model) -> None:
        model.leave.release()
        assert (await lane.predict(rows(3, 4), "u", LATER)).tolist() == [[6], [8]]
        await asyncio.sleep(0)

    (facts,) = run(scenario)
    assert (facts.requests, facts.rows) == (1, {"u": 2})


def test_what_waits_is_taken_together_and_each_gets_its_own() -> None:
    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        others = [await send(lane, value) for value in (1, 2, 3)]
        assert lane.waiting_rows == 3
        model.leave.release(2)
        assert [(await task).tolist() for task in (first, *others)] == [[[0]], [[2]], [[4]], [[6]]]
        assert model.batches == [[0], [1, 2, 3]]
        assert lane.waiting_rows == 0

    facts = run(scenario)
    assert [batch.requests for batch in facts] == [1, 3]


def test_a_batch_is_bounded() -> None:
    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        others = [await send(lane, value) for value in range(1, 6)]
        model.leave.release(9)
        await asyncio.gather(first, *others)
        assert model.batches == [[0], [1, 2], [3, 4], [5]]

    run(scenario, batch_rows=2)


def test_users_take_turns() -> None:
    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        tasks = [await send(lane, value, "flood") for value in (1, 2, 3, 4)]
        tasks += [await send(lane, value, "quiet") for value in (10, 20)]
        model.leave.release(9)
        await asyncio.gather(first, *tasks)
        assert model.batches == [[0], [1, 10, 2], [20, 3, 4]]

    run(scenario, batch_rows=3)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        tasks = [await send(lane, 1, f"u{number}") for number in range(4)]
        with pytest.raises(Overloaded, match="4 rows wait already") as refused:
            await lane.predict(rows(9), "u9", LATER)
        assert refused.value.status == 429
        assert refused.value.retry_after_s is not None
        model.leave.release(9)
        await asyncio.gather(first, *tasks)
        model.leave.release()
        assert (await lane.predict(rows(9), "u9", LATER)).tolist() == [[18]]

    run(scenario, queue_rows=4)


def test_one_user_holds_half_of_the_queue_at_most() -> None:
    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        tasks = [await send(lane, 1, "flood") for _ in range(4)]
        with pytest.raises(Overloaded, match="4 of them yours"):
            await lane.predict(rows(1), "flood", LATER)
        tasks.append(await send(lane, 2, "quiet"))
        model.leave.release(9)
        await asyncio.gather(first, *tasks)

    run(scenario, queue_rows=8)


def test_a_request_greater_than_the_queue_passes_alone() -> None:
    async def scenario(lane: Lane, model: Model) -> None:
        model.leave.release()
        assert len(await lane.predict(rows(*range(100, 200)), "u", LATER)) == 100

    run(scenario, queue_rows=8)


def test_a_cancelled_request_is_not_computed() -> None:
    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        gone, stays = await send(lane, 1), await send(lane, 2)
        gone.cancel()
        await asyncio.sleep(0)
        assert lane.waiting_rows == 1
        model.leave.release(9)
        assert (await stays).tolist() == [[4]]
        assert gone.cancelled()
        await first
        assert model.batches == [[0], [2]]

    run(scenario)


def test_a_late_request_is_answered_in_time_and_not_computed() -> None:
    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded) as late:
            await lane.predict(rows(1), "u", start + 0.02)
        assert time.monotonic() - start < 5
        assert late.value.status == 504
        assert lane.waiting_rows == 0
        with pytest.raises(DeadlineExceeded):
            await lane.predict(rows(1), "u", start)
        model.leave.release(9)
        await first
        assert model.batches == [[0]]

    run(scenario)


def test_only_the_request_at_fault_fails() -> None:
    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        good, bad, other = [await send(lane, value) for value in (1, 13, 2)]
        model.leave.release(9)
        assert (await good).tolist() == [[2]]
        assert (await other).tolist() == [[4]]
        with pytest.raises(PredictionFailure, match="thirteen"):
            await bad
        await first
        assert model.batches == [[0], [1, 13, 2], [1], [13], [2]]

    run(scenario)


def test_a_closed_lane_answers_what_waits_and_takes_no_more() -> None:
    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        waits = await send(lane, 1)
        lane.close()
        with pytest.raises(Overloaded, match="unloaded"):
            await lane.predict(rows(2), "u", LATER)
        model.leave.release(9)
        assert (await waits).tolist() == [[2]]
        await first
        assert await asyncio.to_thread(lane.join, 5)
        assert lane.is_idle

    run(scenario)


def test_a_large_request_comes_in_slices_and_others_in_between() -> None:
    large = np.arange(10, dtype=np.float32).reshape(-1, 1)

    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        waiting = asyncio.create_task(lane.predict(large, "large", LATER))
        await asyncio.sleep(0)
        small = await send(lane, 77.0, "small")
        model.leave.release(10)
        np.testing.assert_array_equal(await waiting, large * 2)
        assert (await small).tolist() == [[154]]
        await first

    run(scenario, batch_rows=4)


def test_slices_of_others_let_a_small_request_through() -> None:
    large = np.arange(12, dtype=np.float32).reshape(-1, 1)

    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        waiting = asyncio.create_task(lane.predict(large, "large", LATER))
        await asyncio.sleep(0)
        small = await send(lane, 77.0, "small")
        model.leave.release(10)
        await asyncio.gather(first, waiting, small)
        assert model.batches == [
            *([0.0], [0.0, 1.0, 2.0, 3.0]),
            *([77.0, 4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]),
        ]

    run(scenario, batch_rows=4)


def test_a_large_request_waits_whole_or_not_at_all() -> None:
    large = np.zeros((9, 1), np.float32)

    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        other = await send(lane, 1.0, "other")
        with pytest.raises(Overloaded):
            await lane.predict(large, "large", LATER)
        assert lane.waiting_rows == 1
        model.leave.release(10)
        await asyncio.gather(first, other)

    run(scenario, batch_rows=4, queue_rows=9)


def test_where_a_slice_fails_the_rest_is_not_computed_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    large = np.array([[13.0]] * 4 + [[1.0]] * 8, np.float32)

    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        waiting = asyncio.create_task(lane.predict(large, "large", LATER))
        await asyncio.sleep(0)
        model.leave.release(2)
        with pytest.raises(PredictionFailure, match="thirteen"):
            await waiting
        assert lane.waiting_rows <= 4  # one slice may be at work
        model.leave.release(10)
        await first

    run(scenario, batch_rows=4)
    assert caplog.text == ""


def test_a_deadline_is_that_of_all_slices(caplog: pytest.LogCaptureFixture) -> None:
    large = np.zeros((12, 1), np.float32)

    async def scenario(lane: Lane, model: Model) -> None:
        first = await busy(lane, model)
        with pytest.raises(DeadlineExceeded):
            await lane.predict(large, "large", time.monotonic() + 0.05)
        assert lane.waiting_rows == 0
        model.leave.release(10)
        await first

    run(scenario, batch_rows=4)
    assert caplog.text == ""
