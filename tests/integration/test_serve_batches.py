"""Batch jobs of `lockstep serve`: they go on when the service is ended, or killed, and begun again.

Real Ray Serve, one predictor, TensorFlow.
"""

import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from registry.database import Database
from serving.accounts import Accounts
from tests.support.killed_service import KilledService
from tests.support.served import MODEL, database_url, prepare

SHARDS = 120
ROWS = 65_536 * SHARDS


@pytest.fixture
def folder(tmp_path):
    table = pa.table(
        {"id": np.arange(ROWS), "x": np.random.default_rng(1).random(ROWS, np.float32)}
    )
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data/in.parquet", row_group_size=2**18)
    return tmp_path


@pytest.fixture
def key(folder):
    made = prepare(folder)
    database = Database(database_url(folder))
    Accounts(database).allow_input("tester", str(folder / "data"), who="test")
    database.close()
    return made


def submit(service, folder, **values):
    request = {"model": MODEL, "input": str(folder / "data/in.parquet"), "shard_rows": 65_536}
    return service.batches.submit({**request, **values})["id"]


def wait_for_shards(service, name, count, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while (job := service.batches.job(name))["shards"]["done"] < count:
        assert job["status"] in ("validating", "in_progress"), job
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
    return job


def files(service, name, folder):
    """Hashes of a job's files; its predictions are right, each row once and in order."""
    job = service.batches.wait(name)
    assert (job["status"], job["progress"]) == ("completed", 1.0), job
    manifest = service.batches.download(name, folder / name)
    assert manifest["is_complete"]
    found = pa.concat_tables(
        pq.read_table(folder / name / part["name"]) for part in manifest["parts"]
    )
    data = pq.read_table(folder / "data/in.parquet")
    assert np.array_equal(found["__row__"].to_numpy(), np.arange(ROWS))
    assert found["id"].equals(data["id"])
    np.testing.assert_allclose(
        found["prediction"].to_numpy(), data["x"].to_numpy() / 2 + 2, rtol=1e-6
    )
    return {entry["name"]: entry["sha256"] for entry in manifest["parts"] + manifest["errors"]}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_queued_and_running_jobs_go_on_after_a_restart(folder, key):
    service = KilledService(folder, key, "--predictors", "1")
    try:
        service.start()
        undisturbed = files(service, submit(service, folder), folder)
        running = submit(service, folder)
        queued = [submit(service, folder, priority=-1) for _ in range(2)]
        job = wait_for_shards(service, running, 3)
        assert job["shards"]["done"] < SHARDS
        service.end()
        service.start()
        for name in (running, *queued):
            assert files(service, name, folder) == undisturbed
        service.end()
    finally:
        service.close()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_job_goes_on_when_the_whole_service_was_killed_in_the_middle_of_it(folder, key):
    service = KilledService(folder, key, "--predictors", "1")
    try:
        service.start()
        undisturbed = files(service, submit(service, folder), folder)
        name = submit(service, folder)
        wait_for_shards(service, name, 3)
        assert service.kill() > 3  # Ray, the replica, the dispatching, the predictor
        service.start()
        assert service.batches.job(name)["shards"]["done"] < SHARDS
        assert files(service, name, folder) == undisturbed
        service.end()
    finally:
        service.close()


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_six_kills_of_the_whole_service_leave_no_trace(folder, key):
    chance = random.Random(int(time.time()))
    service = KilledService(folder, key, "--predictors", "1")
    try:
        service.start()
        undisturbed = files(service, submit(service, folder), folder)
        name = submit(service, folder)
        for _ in range(6):
            done = service.batches.job(name)["shards"]["done"]
            job = wait_for_shards(service, name, done + chance.randint(0, 3))
            assert job["status"] in ("validating", "in_progress"), job
            time.sleep(chance.uniform(0.0, 0.2))
            service.kill()
            service.start()
        assert files(service, name, folder) == undisturbed
        service.end()
    finally:
        service.close()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_predictors_are_actors_where_the_settings_say_so(folder, key):
    config = folder / "service.yaml"
    config.write_text(yaml.safe_dump({"predictor_pool": "actors", "predictors": 1}))
    service = KilledService(folder, key, "--config", str(config))
    try:
        service.start()
        name = submit(service, folder)
        wait_for_shards(service, name, 1)
        actors = [each for each in service.descendants() if "_ActorStation" in each.name()]
        named = [" ".join(each.cmdline()) for each in service.descendants()]
        assert actors or any("_ActorStation" in line for line in named)
        files(service, name, folder)
        service.end()
    finally:
        service.close()
