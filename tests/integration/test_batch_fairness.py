"""Fair shares with real processes and clocks; the arithmetic is in tests/unit/test_dispatcher."""

import time

import pytest

from tests.support.batches import Dispatching, Place, rows

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

BATCH_ROWS = 64
PREDICTORS = 2


def started(tmp_path, call_s):
    """A place whose shards take about so long each, and the loop."""
    place = Place(tmp_path / "place", {"call_s": call_s}, inline=False)
    dispatching = Dispatching(place.config)
    place.wait(place.submit(input=place.write(rows(BATCH_ROWS * PREDICTORS), "first.parquet")))
    return place, dispatching


def user(place, name):
    made = place.user(name)
    place.accounts.allow_input(name, str(place.data), who="test")
    return made


def test_a_small_job_beside_a_flood_begins_after_a_few_shards(tmp_path):
    shard_s = 1.0
    place, dispatching = started(tmp_path, shard_s)
    try:
        bob = user(place, "bob")
        flood = place.submit(input=place.write(rows(BATCH_ROWS * 1_000)), shard_rows=BATCH_ROWS)
        deadline = time.monotonic() + 60
        while place.service.job(place.account, flood).shard_done < 6:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        name = place.submit(bob, input=place.write(rows(10), "small.parquet"))
        while (job := place.service.job(bob, name)).is_active:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert job.status == "completed"
        # Its plan is its first turn, its only shard the second; each begins within so long.
        within_s = (PREDICTORS + 1) * shard_s
        assert job.in_progress_at - job.created_at < within_s + 1.0
        assert job.completed_at - job.created_at < 2 * within_s + 1.0
        assert place.service.job(place.account, flood).shard_done < 100
        place.service.cancel(place.account, flood)
    finally:
        dispatching.close()
        place.close()


def test_equal_users_have_equal_shares(tmp_path):
    place, dispatching = started(tmp_path, 0.05)
    try:
        users = [user(place, f"u{n}") for n in range(20)]
        path = place.write(rows(BATCH_ROWS * 200))
        # The first of them asks for five times as much as the others.
        names = [(each, place.submit(each, input=path, shard_rows=BATCH_ROWS)) for each in users]
        names += [
            (users[0], place.submit(users[0], input=path, shard_rows=BATCH_ROWS)) for _ in range(4)
        ]
        deadline = time.monotonic() + 300
        while True:
            served = dict.fromkeys((each.user for each in users), 0.0)
            done = 0
            for each, name in names:
                job = place.service.job(each, name)
                served[each.user] += job.compute_s
                done += job.shard_done
            if done >= 20 * 20:
                break
            assert time.monotonic() < deadline, served
            time.sleep(0.2)
        shares = list(served.values())
        jain = sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))
        assert jain > 0.95, served
    finally:
        dispatching.close()
        place.close()
