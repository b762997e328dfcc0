"""Exactly once: whoever is killed when, the output is that of the undisturbed job, bit for bit."""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from serving.batch_output import SUCCESS, PartFile
from serving.errors import OwnershipLost
from tests.support.batches import Dispatching, Place, expected, hashes, output, rows
from tests.support.drivers import wait_for

CALL_S = 0.01


@pytest.fixture
def place(tmp_path):
    found = Place(tmp_path / "place", {"call_s": CALL_S}, inline=False)
    yield found
    found.close()


def kill_a_predictor(dispatching, chance, timeout_s=60.0):
    """SIGKILL to one of the loop's children, as soon as it has one; it must have died of it."""
    deadline = time.monotonic() + timeout_s
    while not (children := dispatching.children()):
        assert time.monotonic() < deadline, "the loop has no predictor"
        time.sleep(0.05)
    pid = chance.choice(children)
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)


def wait_for_end(pid, timeout_s=20.0):
    """Until a process is gone, or waits for its parent to notice."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        assert time.monotonic() < deadline, f"process {pid} lives"
        time.sleep(0.02)


def kill_all(dispatching):
    """The loop and its predictors at once; another loop in its place."""
    children = dispatching.children()
    dispatching.process.kill()
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in children:
        wait_for_end(pid)
    dispatching.restart()


def wait_for_shards(place, name, count, timeout_s=60.0):
    """Until so many shards are done, or the job has ended; returns whether it still runs."""
    deadline = time.monotonic() + timeout_s
    while (job := place.service.job(place.account, name)).is_active:
        assert time.monotonic() < deadline, job
        if job.shard_done >= count:
            return True
        time.sleep(0.01)
    return False


def check(job, undisturbed, table):
    assert job.status == "completed", job.problems
    assert hashes(job) == hashes(undisturbed)
    assert (job.row_done, job.shard_done) == (table.num_rows, job.shard_total)
    found = output(job)
    assert found["__row__"].to_pylist() == list(range(table.num_rows))
    assert found["id"].equals(table["id"])
    folder = Path(job.folder)
    held = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert held == sorted([*hashes(job), SUCCESS, "manifest.json"])


def test_three_kills_leave_no_trace(place):
    chance = random.Random(5)
    table = rows(64 * 30)
    path = place.write(table, row_group_size=500)
    dispatching = Dispatching(place.config)
    try:
        undisturbed = place.wait(place.submit(input=path, shard_rows=64))
        np.testing.assert_allclose(
            output(undisturbed)["prediction"].to_numpy(), expected(table), rtol=1e-6
        )
        name = place.submit(input=path, shard_rows=64)
        kills = 0
        for kill in (
            lambda: kill_a_predictor(dispatching, chance),
            dispatching.restart,
            lambda: kill_all(dispatching),
        ):
            done = place.service.job(place.account, name).shard_done
            if wait_for_shards(place, name, done + 2):
                kill()
                kills += 1
        job = place.wait(name)
        assert kills == 3
        check(job, undisturbed, table)
        attempts = place.service._store
        assert max(s.epoch for s in attempts.shards(job.id)) >= 2
    finally:
        dispatching.close()


def test_what_a_crash_leaves_between_two_steps_is_put_right(tmp_path):
    """Between report, renaming and done: a successor finds each of these states and goes on."""
    place = Place(tmp_path / "place")
    table = rows(64 * 8)
    path = place.write(table)
    undisturbed = place.until(place.submit(input=path, shard_rows=64))
    name = place.submit(input=path, shard_rows=64)
    place.until(name, "in_progress")
    leases = place.runner._turns.state.committer.leases
    crashed = {"reported": 0, "renamed": 1, "damaged": 2}
    real_done, real_commit = leases.done, place.runner._turns.state.committer.commit

    def commit(job, shard, files, bad, compute_s):
        if shard.number == crashed["reported"]:
            leases.report(shard, files, bad, compute_s)
            return False
        if shard.number == crashed["damaged"]:
            leases.report(shard, files, bad, compute_s)
            attempt = Path(job.folder, files[0].attempt(shard.epoch))
            attempt.write_bytes(attempt.read_bytes()[:-1])
            return False
        return real_commit(job, shard, files, bad, compute_s)

    def done(shard, now):
        if shard.number != crashed["renamed"]:
            real_done(shard, now)

    place.runner._turns.state.committer.commit = commit
    leases.done = done
    for _ in range(6):
        place.runner.step(0.0)
    statuses = [shard.status for shard in place.service._store.shards(name)]
    assert statuses[:3] == ["reported"] * 3
    assert "done" in statuses
    lost = statuses.index("done")
    place.runner.abandon()  # dies without a word; a part of its output vanishes, too
    folder = Path(place.service.job(place.account, name).folder)
    Path(folder, f"parts/part-{lost:05d}.parquet").unlink()
    place.runner._store.release(1)
    job = place.until(name)
    check(job, undisturbed, table)
    epochs = [shard.epoch for shard in place.service._store.shards(name)]
    assert epochs[:3] == [1, 1, 2]  # taken, taken, computed again
    assert epochs[lost] == 2
    place.close()


def test_a_superseded_owner_and_a_late_attempt_change_nothing(tmp_path):
    place = Place(tmp_path / "place")
    table = rows(64 * 4)
    name = place.submit(input=place.write(table), shard_rows=64)
    place.until(name, "in_progress")
    old = place.runner
    state = old._turns.state
    job = place.service.job(place.account, name)
    shard = state.committer.leases.lease(name, 0, 0, time.time())
    late = Path(job.folder, "parts/.tmp/part-00000.1.parquet")
    late.write_bytes(b"late")
    place.service._store.release(state.epoch)
    place.runner = type(old)(
        place.service._store, place.registry, place.accounts, old._make_pool, old._settings
    )
    job = place.until(name)
    assert job.status == "completed"
    part = hashes(job)
    with pytest.raises(OwnershipLost):
        state.committer.commit(job, shard, [PartFile("parts/part-00000.parquet", 1, 4, "x")], 0, 0)
    with pytest.raises(OwnershipLost):
        old.step(0.0)
    assert hashes(job) == part
    assert output(job).num_rows == 256
    assert place.service._store.shards(name)[0].epoch == 2
    place.close()


def is_at_work(place, name):
    """Whether a predictor computes a shard: a kill before one has come up again hits nothing."""
    return any(shard.status == "leased" for shard in place.service._store.shards(name))


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_twenty_random_kills_during_one_job_of_two_million_rows(tmp_path):
    """Predictor, dispatcher, both at once: TensorFlow's predictions of two million rows, unharmed.

    Each call of the model takes two seconds here, so that the job outlasts the kills.
    """
    from tests.support.batch_models import SLOW_LOADER, register_flights_like

    # A shard that is lost five times fails its job, and kills come faster than shards here.
    place = Place(tmp_path / "place", runner={"attempts": 30}, inline=False)
    table = register_flights_like(place, rows=2_000_000)
    path = place.write(table, row_group_size=100_000)
    values = {"input": path, "model": "mlp", "shard_rows": 65_536, "keep": ["id"]}
    calm = Dispatching(place.config)
    try:
        undisturbed = place.wait(place.submit(**values), timeout_s=600)
    finally:
        calm.close()
    assert undisturbed.status == "completed", undisturbed.problems
    chance = random.Random(int(time.time()))
    dispatching = Dispatching(replace(place.config, loader=SLOW_LOADER))
    kills = {"predictor": 0, "dispatcher": 0, "all": 0}
    try:
        name = place.submit(**values)
        for number in range(20):
            wait_for(lambda: is_at_work(place, name), "shard at work")
            time.sleep(chance.uniform(0.0, 2.0))
            kind = list(kills)[number % 3]
            job = place.service.job(place.account, name)
            assert job.is_active, f"ended after {number} kills: {job}"
            if kind == "predictor":
                kill_a_predictor(dispatching, chance)
            elif kind == "dispatcher":
                dispatching.restart()
            else:
                kill_all(dispatching)
            kills[kind] += 1
        job = place.wait(name, timeout_s=900)
        check(job, undisturbed, table)
        epochs = [shard.epoch for shard in place.service._store.shards(name)]
        print(json.dumps({"kills": kills, "attempts": sum(epochs)}), file=sys.stderr)
        assert sum(kills.values()) == 20
        assert max(epochs) >= 2  # some of them hit a shard
    finally:
        dispatching.close()
        place.close()
        shutil.rmtree(place.data)
