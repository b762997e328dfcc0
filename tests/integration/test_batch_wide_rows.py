"""Rows of any size in bounded memory, and the same predictions for them."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from serving import batch_rows, shards
from tests.support.batches import ROOT, Place, expected, hashes, output, rows


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Bounds a thousandth of the real ones, so that a kilobyte makes a large row."""
    for module, name, value in (
        (shards, "MAX_CALL_BYTES", 64 * 2**10),
        (shards, "MAX_SHARD_BYTES", 64 * 2**10),
        (shards, "MARK_BYTES", 8 * 2**10),
        (batch_rows, "_BYTES_AT_ONCE", 64 * 2**10),
    ):
        monkeypatch.setattr(module, name, value)
    found = Place(tmp_path / "place")
    yield found
    found.close()


def wide(count, size):
    """Rows of which each has a text of so many letters."""
    texts = [f"{n:06d}" + "x" * size for n in range(count)]
    return rows(count).append_column("text", pa.array(texts))


def write(place, table, suffix):
    path = place.data / f"in{suffix}"
    if suffix == ".csv":
        pacsv.write_csv(table, path)
    elif suffix == ".ndjson":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        pq.write_table(table, path, row_group_size=200, use_dictionary=False)
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".ndjson", ".parquet"])
def test_large_rows_are_read_and_cut_in_small_portions(place, suffix, monkeypatch):
    table = wide(500, 2_000)  # a call of 64 of them would have 128 KiB
    portions, real = [], batch_rows.read_chunks

    def read_chunks(source, shard):
        for chunk in real(source, shard):
            portions.append((chunk.first_row, chunk.rows))
            yield chunk

    monkeypatch.setattr("serving.batch_worker.read_chunks", read_chunks)
    path = write(place, table, suffix)
    job = place.until(place.submit(input=path, keep=["id", "text"]))
    assert (job.status, job.row_bad) == ("completed", 0), job.problems
    found = output(job)
    assert found["text"].equals(table["text"])
    np.testing.assert_allclose(found["prediction"].to_numpy(), expected(table), rtol=1e-5)
    assert {count for _, count in portions} <= {8, 4}
    assert all(first % 8 == 0 for first, _ in portions)
    largest = max(shard.row_count for shard in place.service._store.shards(job.id))
    assert largest * 2_000 <= 64 * 2**10 + 8 * 2**10 + 8 * 2_100
    again = place.until(place.submit(input=path, keep=["id", "text"]))
    assert hashes(again) == hashes(job)
    whole = place.until(place.submit(input=path, keep=["id"], shard_rows=4096))
    assert output(whole)["prediction"].equals(found["prediction"])


@pytest.mark.parametrize("suffix", [".csv", ".ndjson", ".parquet"])
def test_small_rows_are_called_with_as_many_as_ever(place, suffix):
    job = place.until(place.submit(input=write(place, wide(500, 10), suffix)))
    source = json.loads(job.plan)["source"]
    assert (job.status, source["call_rows"]) == ("completed", 64)


def test_batches_of_parquet_have_as_many_rows_as_fit(place, monkeypatch):
    seen, real = [], pq.ParquetFile.iter_batches

    def iter_batches(self, batch_size, **options):
        for batch in real(self, batch_size, **options):
            seen.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    path = write(place, wide(500, 2_000), ".parquet")
    assert place.until(place.submit(input=path, keep=["text"])).status == "completed"
    assert 0 < max(seen) <= 64 * 2**10
    seen.clear()
    job = place.until(place.submit(input=path, keep=["id"]))
    assert job.status == "completed"
    assert len(seen) <= 2 * job.shard_total  # the wide column is not read, others come at once


_MEASURED = """
import json, resource, sys
from pathlib import Path
from tests.support.batches import Place

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

place = Place(Path(sys.argv[1], "place"))
place.accounts.allow_input("ada", sys.argv[1], who="test")
small = place.until(place.submit(input=sys.argv[2]))
before_mb = peak_mb()
large = place.until(place.submit(input=sys.argv[3]), timeout_s=300)
print(json.dumps([small.status, large.status, large.row_total, peak_mb() - before_mb]))
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("suffix", ["ndjson", "csv"])
def test_a_file_of_large_rows_takes_a_bounded_part_of_memory(tmp_path, suffix):
    """1.2 GiB of lines of 512 KiB; there are fewer than are in the least shard of small ones."""
    small, large = tmp_path / f"small.{suffix}", tmp_path / f"large.{suffix}"
    for path, count, text in ((small, 10, "x"), (large, 2_400, "x" * 2**19)):
        with path.open("w") as file:
            if suffix == "csv":
                file.write("a,b,text\n")
            for n in range(count):
                line = f'{{"a": {n}, "b": 1, "text": "{text}"}}\n'
                file.write(line if suffix == "ndjson" else f"{n},1,{text}\n")
    told = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path), str(small), str(large)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        timeout=350,
    )
    large.unlink()
    assert told.returncode == 0, told.stderr
    first, second, total, grown_mb = json.loads(told.stdout)
    assert (first, second, total) == ("completed", "completed", 2_400)
    assert grown_mb < 800
