"""What fails around jobs: models, storage, sweeping. It is that job's matter, and nobody else's."""

import json
import threading
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline.errors import ReadError
from serving import batch_commit
from tests.support.batches import Place, hashes, output, rows

FASTER = 500.0


@pytest.fixture
def place(tmp_path):
    found = Place(tmp_path / "place", runner={"refresh_s": 0.2, "lease_s": 500.0})
    found.runner._monotonic = lambda: time.monotonic() * FASTER  # delays pass sooner
    yield found
    found.close()


def broken_model(place, user):
    """A model of a user whose artifact lost its bytes; how to bring them back."""
    version = place.registry.register("broken", place.folder / "artifact")
    place.registry.set_alias("broken", "champion", version.number, who="test", why="test")
    path = Path(version.artifact.removeprefix("file://"), "settings.json")
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(b"{}  ")
    place.accounts.allow_input(user, str(place.data), who="test")
    return lambda: path.write_bytes(whole)


def test_a_damaged_model_fails_its_own_job_alone(place):
    bob = place.user("bob")
    broken_model(place, "bob")
    path = place.write(rows(64 * 20))
    theirs = place.submit(bob, model="broken", input=path)
    mine = place.submit(input=path, shard_rows=64)
    assert place.until(mine).status == "completed"
    assert {shard.epoch for shard in place.service._store.shards(mine)} == {1}
    place.account = bob
    job = place.until(theirs)
    (problem,) = json.loads(job.problems)
    assert (job.status, problem["code"]) == ("failed", "model_unavailable")
    assert str(place.folder) not in problem["message"]
    assert place.runner._turns.state.epoch == 1  # the loop never had to begin anew


def test_a_model_that_comes_back_in_time_costs_time_only(place):
    bob = place.user("bob")
    mend = broken_model(place, "bob")
    name = place.submit(bob, model="broken", input=place.write(rows(100)))
    place.account = bob
    for _ in range(5):
        place.runner.step(0.01) if place.runner._turns else place.runner.begin()
        time.sleep(0.01)
    assert place.service.job(bob, name).status == "validating"
    mend()
    assert place.until(name).status == "completed"


def test_a_model_that_is_long_in_coming_holds_up_nobody_else(place):
    is_here, real = threading.Event(), place.registry.fetch
    slow = place.registry.register("slow", place.folder / "artifact")
    place.registry.set_alias("slow", "champion", slow.number, who="test", why="test")

    def fetch(version):
        if version.name == "slow":
            assert is_here.wait(20)
        return real(version)

    place.runner._models.fetch = fetch
    path = place.write(rows(200))
    waits = [place.submit(model="slow", input=path) for _ in range(10)]
    assert place.until(place.submit(input=path, shard_rows=64)).status == "completed"
    assert {place.service.job(place.account, name).status for name in waits} == {"validating"}
    is_here.set()
    assert {place.until(name).status for name in waits} == {"completed"}


def interrupted(place):
    """A job of which some shards are done, and whose owner is gone without a word."""
    name = place.submit(input=place.write(rows(64 * 8)), shard_rows=64)
    place.until(name, "in_progress")
    for _ in range(2):
        place.runner.step(0.0)
    place.runner.abandon()
    place.service._store.release(1)
    assert 0 < place.service.job(place.account, name).shard_done < 8
    return name


@pytest.mark.parametrize("failure", [OSError("the disk is away"), ReadError("no answer")])
def test_storage_that_is_away_at_a_restart_fails_no_job(place, monkeypatch, failure):
    undisturbed = place.until(place.submit(input=place.write(rows(64 * 8)), shard_rows=64))
    place.write(rows(64 * 8))
    name, tries = interrupted(place), []
    real = batch_commit.prepare_folder

    def away(folder):
        tries.append(folder)
        if len(tries) <= 7:  # more often than a shard may fail
            raise failure
        real(folder)

    monkeypatch.setattr(batch_commit, "prepare_folder", away)
    job = place.until(name)
    assert (job.status, len(tries)) == ("completed", 8)
    assert hashes(job) == hashes(undisturbed)
    assert output(job).num_rows == 64 * 8
    assert place.runner._turns.state.epoch == 2


def test_storage_that_stays_away_fails_the_job_in_the_end(place, monkeypatch):
    name, tries = interrupted(place), []

    def away(folder):
        tries.append(folder)
        raise ReadError("no answer")

    monkeypatch.setattr(batch_commit, "prepare_folder", away)
    place.runner._monotonic = lambda: time.monotonic() * 5_000
    job = place.until(name)
    (problem,) = json.loads(job.problems)
    assert (job.status, problem["code"]) == ("failed", "environment_failure")
    assert len(tries) == place.runner._settings.begin_attempts


def test_storage_that_is_away_when_a_plan_arrives_is_tried_again(place, monkeypatch):
    from serving import batch_turns

    real, tries = batch_turns.prepare_folder, []

    def away(folder):
        tries.append(folder)
        if len(tries) <= 2:
            raise ReadError("no answer")
        real(folder)

    monkeypatch.setattr(batch_turns, "prepare_folder", away)
    job = place.until(place.submit(input=place.write(rows(100))))
    assert (job.status, len(tries)) == ("completed", 3)
    assert place.accounts.rows_today("ada") == 100  # counted once
    assert place.runner._turns.state.epoch == 1


def test_an_output_that_cannot_be_removed_stops_neither_sweep_nor_loop(place):
    path = place.write(rows(10))
    where = str(place.folder / "out/ada/mine")
    stuck = place.until(place.submit(input=path, output=where, output_expires_after_s=60))
    other = place.until(place.submit(input=path, output_expires_after_s=60))
    mine = Path(where)
    mine.rename(mine.with_name("away"))
    mine.symlink_to(place.data)  # the folder is the user's: anything may be there
    place.service._clock = lambda: 4e9
    place.runner._sweep_at_s = place.runner._refresh_at_s = 0.0
    place.runner.step(0.0)
    assert not Path(other.folder).exists()
    name = place.submit(input=path)
    place.service._clock = time.time
    assert place.until(name).status == "completed"
    with pytest.raises(UserError):
        place.service.delete_output(place.account, stuck.id)
