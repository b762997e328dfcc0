"""Batch jobs whose rows and outputs are in an object store."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import storage
from serving import output_folder
from serving.batch_process import make_batches
from serving.errors import LocationError
from tests.support.batches import Place, expected, rows
from tests.support.stores import MemoryStores


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A place whose user may read and write in a store, which is in memory."""
    found = Place(tmp_path / "place")
    found.stores = MemoryStores(monkeypatch)
    # The file system in memory has folders, which stores have not.
    make = found.stores.make_folder
    monkeypatch.setattr(output_folder, "make_folder", lambda folder, name: make(f"{folder}/{name}"))
    found.accounts.allow_input("ada", "s3://bucket/team", who="test")
    service = {"folder": str(tmp_path / "service"), "outputs": ["s3://bucket/out/{user}"]}
    found.config = replace(found.config, service=service)
    found.service, found.runner = make_batches(found.config, lambda: found.pool)
    yield found
    found.close()


def put(place, table, uri):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=100)
    return place.stores.put(uri, sink.getvalue().to_pybytes())


def table_of(job, name):
    return pq.read_table(pa.BufferReader(storage.read_whole(f"{job.folder}/{name}")))


def names_below(folder):
    return [entry.name for entry in storage.list_folder(folder)]


@pytest.fixture
def job(place):
    """A job that has ended, with a bad row, of two files in the store."""
    table = rows(400)
    column = table["a"].to_numpy().copy()
    column[7] = np.nan
    bad = table.set_column(1, "a", pa.array(column))
    put(place, bad.slice(0, 150), "s3://bucket/team/day=1/x.parquet")
    put(place, bad.slice(150), "s3://bucket/team/day=2/x.parquet")
    values = {"input": "s3://bucket/team/day=*/x.parquet", "keep": ["id", "day"]}
    name = place.submit(output="s3://bucket/out/ada/mine", shard_rows=128, **values)
    found = place.until(name)
    assert (found.status, found.row_total, found.row_bad) == ("completed", 400, 1), found.problems
    return found


def test_rows_come_from_a_store_and_predictions_go_to_one(place, job):
    assert job.folder == f"s3://bucket/out/ada/mine/{job.id}"
    manifest = json.loads(storage.read_whole(f"{job.folder}/manifest.json"))
    found = pa.concat_tables([table_of(job, part["name"]) for part in manifest["parts"]])
    good = np.setdiff1d(np.arange(400), [7])
    table = rows(400)
    assert found["__row__"].to_pylist() == good.tolist()
    assert found["day"].to_pylist() == [1] * 149 + [2] * 250
    np.testing.assert_allclose(found["prediction"].to_numpy(), expected(table)[good], rtol=1e-6)
    (entry,) = manifest["errors"]
    assert table_of(job, entry["name"])["row"].to_pylist() == [7]
    assert storage.exists(f"{job.folder}/_SUCCESS")
    assert names_below(f"{job.folder}/parts/.tmp") == []
    part = b"".join(place.service.part(place.account, job.id, manifest["parts"][0]["name"]))
    assert part == storage.read_whole(f"{job.folder}/{manifest['parts'][0]['name']}")
    place.service.delete_output(place.account, job.id)
    assert names_below(f"{job.folder}/parts") in ([], [".tmp"])
    assert not storage.exists(f"{job.folder}/manifest.json")


def test_a_job_in_a_store_goes_on_after_a_crash(place, job):
    values = {"input": "s3://bucket/team/day=*/x.parquet", "keep": ["id", "day"]}
    name = place.submit(output="s3://bucket/out/ada/mine", shard_rows=128, **values)
    place.until(name, "in_progress")
    committer = place.runner._turns.state.committer
    committer.leases.done = lambda shard, now: None  # dies after the store has copied
    place.runner.step(0.0)
    place.runner.abandon()
    place.service._store.release(1)
    again = place.until(name)
    first, second = (
        {
            entry["name"]: entry["sha256"]
            for entry in json.loads(storage.read_whole(f"{each.folder}/manifest.json"))["parts"]
        }
        for each in (job, again)
    )
    assert first == second
    epochs = [shard.epoch for shard in place.service._store.shards(name)]
    assert epochs == [1, 1, 1, 1]  # what was copied was taken


def test_other_places_of_the_store_are_refused(place):
    put(place, rows(10), "s3://bucket/other/x.parquet")
    for values in (
        {"input": "s3://bucket/other/x.parquet"},
        {"input": "s3://bucket/team/../other/x.parquet"},
        {"input": "s3://bucket/*/x.parquet"},
        {"input": "s3://bucket/team/x.parquet", "output": "s3://bucket/out/bob"},
        {"input": "s3://bucket/team/x.parquet", "output": "s3://bucket/team"},
    ):
        with pytest.raises(LocationError):
            place.submit(**values)
