"""Batch jobs from submission to manifest: real tables and files, a model without TensorFlow.

Predictors work in this process here; what their death does is in tests/chaos/test_batches.py.
"""

import csv
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from configs.errors import EnvironmentFailure, UserError
from registry.errors import DatabaseFailure
from serving.accounts import Quotas
from serving.batch_output import SUCCESS
from serving.batch_wire import describe_job
from serving.errors import BatchError, LocationError, QuotaExceeded
from tests.support.batches import POISON, Place, expected, hashes, output, rows


@pytest.fixture
def place(tmp_path):
    found = Place(tmp_path / "place")
    yield found
    found.close()


def manifest(job):
    return json.loads(Path(job.folder, "manifest.json").read_text())


def errors(job):
    parts = [Path(job.folder, part["name"]) for part in manifest(job)["errors"]]
    tables = [pq.read_table(p).to_pylist() for p in parts if p.suffix == ".parquet"]
    texts = [p.read_text() for p in parts if p.suffix != ".parquet"]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    return [row for table in tables for row in table] + lines


def test_a_job_gives_each_row_its_prediction_in_order(place):
    table = rows(1000)
    place.write(table.slice(0, 333), "part/1.parquet", row_group_size=100)
    place.write(table.slice(333), "part/2.parquet", row_group_size=250)
    job = place.until(place.submit(input=str(place.data / "part"), shard_rows=192))
    assert (job.status, job.row_total, job.row_done, job.row_bad) == ("completed", 1000, 1000, 0)
    found = output(job)
    assert found.column_names == ["__row__", "id", "prediction"]
    assert found["__row__"].to_pylist() == list(range(1000))
    assert found["id"].to_pylist() == table["id"].to_pylist()
    np.testing.assert_allclose(found["prediction"].to_numpy(), expected(table), rtol=1e-6)
    made = manifest(job)
    assert [part["rows"] for part in made["parts"]] == [192] * 5 + [40]
    assert (made["is_complete"], made["has_good_rows"], made["rows"]["total"]) == (True, True, 1000)
    assert made["model"] == {"name": "fake", "version": 1, "digest": job.digest}
    assert sorted(os.listdir(job.folder)) == [SUCCESS, "manifest.json", "parts"]
    told = describe_job(job)
    assert told["progress"] == 1.0
    assert told["request_counts"] == {"total": 1000, "completed": 1000, "failed": 0}
    assert told["created_at"] <= told["in_progress_at"] <= told["completed_at"]


def test_predictions_do_not_depend_on_how_a_job_is_cut(place):
    table = rows(700)
    column = table["a"].to_numpy().copy()
    column[[3, 500]] = np.nan
    path = place.write(table.set_column(1, "a", pa.array(column)), row_group_size=90)
    cuts = [place.until(place.submit(input=path, shard_rows=size)) for size in (64, 320, 2**22)]
    first, *others = [output(job) for job in cuts]
    assert all(other.equals(first) for other in others)
    assert [job.shard_total for job in cuts] == [11, 3, 1]


def with_bad_rows(table):
    a, b = table["a"].to_numpy().copy(), table["b"].to_pylist()
    a[[5, 200]] = POISON
    a[130] = np.nan
    b[131] = None
    return table.set_column(1, "a", pa.array(a)).set_column(2, "b", pa.array(b, pa.float32()))


BAD = {5: "prediction_failed", 130: "missing_value", 131: "missing_value", 200: "prediction_failed"}


@pytest.mark.parametrize("policy", ["quarantine", "null_fill"])
def test_bad_rows_are_told_and_never_fail_the_good_ones(place, policy):
    table = rows(300)
    path = place.write(with_bad_rows(table))
    job = place.until(place.submit(input=path, shard_rows=128, on_error=policy))
    assert (job.status, job.row_bad) == ("completed", 4)
    assert {row["row"]: row["code"] for row in errors(job)} == BAD
    assert [row["column"] for row in errors(job)] == ["a", "a", "b", "a"]
    found = output(job)
    good = np.setdiff1d(np.arange(300), list(BAD))
    if policy == "quarantine":
        assert found["__row__"].to_pylist() == good.tolist()
    else:
        assert found.num_rows == 300
        assert [n for n, v in enumerate(found["prediction"].to_pylist()) if v is None] == list(BAD)
        found = found.take(good)
    np.testing.assert_allclose(found["prediction"].to_numpy(), expected(table)[good], rtol=1e-6)


def test_bad_rows_fail_the_job_where_that_was_asked_for(place):
    path = place.write(with_bad_rows(rows(300)))
    for values in ({"on_error": "fail_fast"}, {"max_error_rate": 0.01}):
        job = place.until(place.submit(input=path, shard_rows=64, **values))
        assert job.status == "failed"
        assert json.loads(job.problems)[0]["code"] == "too_many_bad_rows"
        assert not Path(job.folder, SUCCESS).exists()
        assert manifest(job)["is_complete"] is False
    job = place.until(place.submit(input=path, max_error_rate=0.02))
    assert job.status == "completed"


def test_a_job_without_one_good_row_says_so(place):
    table = rows(10).set_column(1, "a", pa.array([np.nan] * 10, pa.float32()))
    job = place.until(place.submit(input=place.write(table)))
    assert (job.status, job.row_bad) == ("completed", 10)
    assert manifest(job)["has_good_rows"] is False
    assert describe_job(job)["has_good_rows"] is False
    assert output(job).num_rows == 0


def write_csv(place, table, extra=""):
    path = place.data / "in.csv"
    pacsv.write_csv(table, path)
    path.write_text(path.read_text() + extra)
    return str(path)


def test_csv_keeps_its_keys_and_names_its_bad_lines(place):
    table = rows(200).append_column("n", pa.array(range(200)))
    text = '"k,\n1",1.5,2,7\r\n\r\nk2,x,1,8\nk3,1\nk4,NA,1,9\nk5,true,1,10\n'
    path = write_csv(place, table, text)
    job = place.until(place.submit(input=path))
    assert (job.status, job.row_total, job.row_bad) == ("completed", 205, 3)
    assert [(e["row"], e["code"], e["column"]) for e in errors(job)] == [
        (201, "not_a_number", "a"),
        (202, "malformed_row", None),
        (203, "missing_value", "a"),
    ]
    found = output(job).to_pylist()
    assert found[199]["id"] == "k199"
    assert found[200] == {"__row__": 200, "id": "k,\n1", "n": 7, "prediction": 5.5}
    assert found[201] == {"__row__": 204, "id": "k5", "n": 10, "prediction": 3.0}
    values = [row["prediction"] for row in found[:200]]
    np.testing.assert_allclose(values, expected(table), rtol=1e-5)
    job = place.until(place.submit(input=path, output_format="input", keep=["n", "a"]))
    with Path(job.folder, "parts/part-00000.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["__row__", "n", "a", "prediction"]
    assert lines[201] == ["200", "7", "1.5", "5.5"]


def test_ndjson_keeps_its_keys_and_names_its_bad_lines(place):
    table = rows(150)
    lines = [json.dumps(row | {"more": {"x": [1]}}) for row in table.to_pylist()]
    lines[7:7] = ["{bad", "[1]", '{"a": "x", "b": 1}', '{"b": 1}', '{"a": NaN, "b": 1}', ""]
    path = place.data / "in.jsonl"
    path.write_text("\n".join(lines))
    job = place.until(place.submit(input=str(path), output_format="input"))
    assert (job.status, job.row_total, job.row_bad) == ("completed", 155, 5)
    assert [(e["row"], e["code"]) for e in errors(job)] == [
        (7, "invalid_json_line"),
        (8, "invalid_json_line"),
        (9, "not_a_number"),
        (10, "missing_value"),
        (11, "missing_value"),
    ]
    text = Path(job.folder, "parts/part-00000.ndjson").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert [row["id"] for row in found] == table["id"].to_pylist()
    assert found[0]["more"] == {"x": [1]}
    np.testing.assert_allclose([row["prediction"] for row in found], expected(table), rtol=1e-5)
    assert b"".join(place.service.files.content(place.account, job.output_file)) == text.encode()
    job = place.until(place.submit(input=str(path), keep=["id"]))
    assert output(job)["id"].to_pylist() == table["id"].to_pylist()


def test_texts_and_numbers_that_no_column_holds_are_told_of_their_line(place):
    lines = [json.dumps({"id": f"k{n}", "n": n, "a": 1, "b": 2}) for n in range(5)]
    lines[1] = '{"id": "\\ud800", "n": 1, "a": 1, "b": 2}'
    lines[2] = '{"id": "k2", "n": 1180591620717411303424, "a": 1, "b": 2}'
    lines[3] = '{"id": "k3", "n": 3, "a": 1, "b": 2, "\\udfff": 0}'
    path = place.data / "in.ndjson"
    path.write_text("\n".join(lines))
    job = place.until(place.submit(input=str(path)))
    assert (job.status, job.row_total, job.row_bad) == ("completed", 5, 2)
    assert [(e["row"], e["code"]) for e in errors(job)] == [
        (1, "invalid_json_line"),
        (3, "invalid_json_line"),
    ]
    assert output(job)["id"].to_pylist() == ["k0", "k2", "k4"]
    assert [int(n) for n in output(job)["n"].to_pylist()] == [0, 2**70, 4]


def test_lists_go_in_and_come_out(tmp_path):
    place = Place(tmp_path / "place", {"vector": True, "outputs": 2})
    table = rows(100)
    vectors = np.arange(300, dtype=np.float32).reshape(100, 3)
    lists = vectors.tolist()
    lists[4], lists[6], lists[8] = lists[4][:2], None, [1.0, None, 2.0]
    table = table.append_column("v", pa.array(lists, pa.list_(pa.float32())))
    job = place.until(place.submit(input=place.write(table)))
    assert [(e["row"], e["code"]) for e in errors(job)] == [
        (4, "wrong_shape"),
        (6, "missing_value"),
        (8, "missing_value"),
    ]
    good = np.setdiff1d(np.arange(100), [4, 6, 8])
    found = np.array(output(job)["prediction"].to_pylist())
    first = expected(table) + vectors.sum(1)
    np.testing.assert_allclose(found[:, 0], first[good], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], first[good] + 1, rtol=1e-5)
    place.close()


def test_folders_named_key_value_are_columns(place):
    table = rows(40)
    for day in (1, 2):
        part = table.slice(20 * (day - 1), 20)
        place.write(part, f"t/day={day}/x.parquet")
    job = place.until(place.submit(input=str(place.data / "t"), keep=["day", "id"]))
    assert output(job)["day"].to_pylist() == [1] * 20 + [2] * 20


BAD_JOBS = {
    "missing column": (lambda t: t.drop_columns("b"), {}, "missing_column"),
    "text": (lambda t: t.set_column(1, "a", t["id"]), {}, "wrong_type"),
    "no rows": (lambda t: t.slice(0, 0), {}, "empty_file"),
    "clash": (lambda t: t, {"column": "id"}, "column_clash"),
    "unknown key": (lambda t: t, {"keep": ["idd"]}, "missing_column"),
}


@pytest.mark.parametrize("name", BAD_JOBS)
def test_what_is_wrong_with_a_whole_job_is_told_before_it_begins(place, name):
    change, values, code = BAD_JOBS[name]
    job = place.until(place.submit(input=place.write(change(rows(20))), **values))
    (problem,) = json.loads(job.problems)
    assert (job.status, problem["code"]) == ("failed", code)
    assert job.in_progress_at is None
    assert not Path(job.folder).exists()
    if name == "unknown key":
        assert "Did you mean 'id'?" in problem["message"]


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("x.parquet", b"PAR1 no", "unreadable_file"),
        ("x.csv", b"", "empty_file"),
        ("x.csv", b"a,c\n1,2\n", "missing_column"),
        ("x.csv", b"a,a,b\n1,2,3\n", "duplicate_column"),
        ("x.ndjson", b'{"a": 1}\n', "missing_column"),
        ("x.txt", b"1", "unknown_format"),
    ],
)
def test_files_that_cannot_be_used_fail_the_job(place, name, data, code):
    path = place.data / name
    path.write_bytes(data)
    job = place.until(place.submit(input=str(path)))
    assert (job.status, json.loads(job.problems)[0]["code"]) == ("failed", code)


def test_a_request_with_a_key_is_taken_once(place):
    values = {"model": "fake", "input": place.write(rows(10))}
    first, is_new = place.service.submit(place.account, values, "k1")
    again, is_again = place.service.submit(place.account, values, "k1")
    assert (first.id, is_new, is_again) == (again.id, True, False)
    with pytest.raises(BatchError, match="belongs to one request") as error:
        place.service.submit(place.account, values | {"priority": 1}, "k1")
    assert error.value.status == 422
    other = place.user("bob")
    place.accounts.allow_input("bob", str(place.data), who="test")
    assert place.service.submit(other, values, "k1")[1]


def test_a_repeated_request_has_its_job_whatever_has_changed(tmp_path):
    place = Place(tmp_path / "place", quotas=Quotas(queued_jobs=1, rows_per_day=10))
    values = {"model": "fake@champion", "input": place.write(rows(10))}
    first, _ = place.service.submit(place.account, values, "k1")
    again = lambda: place.service.submit(place.account, values, "k1")  # noqa: E731
    assert again() == (first, False)  # as many jobs as are allowed
    assert place.until(first.id).status == "completed"
    done = place.service.job(place.account, first.id)
    assert again() == (done, False)  # as many rows as are allowed
    place.accounts.forbid_input("ada", str(place.data), who="test")
    assert again() == (done, False)
    place.accounts.withdraw("public", "fake", who="test")
    assert again() == (done, False)
    place.registry.set_alias("fake", "champion", None, who="test", why="gone")
    assert again() == (done, False)
    with pytest.raises(BatchError, match="belongs to one request") as error:
        place.service.submit(place.account, values | {"priority": 1}, "k1")
    assert error.value.code == "idempotency_key_reused"
    place.close()


def test_an_alias_is_resolved_when_the_job_is_submitted(place):
    name = place.submit(input=place.write(rows(10)), model="fake@champion")
    second = place.registry.register("fake", place.folder / "artifact")
    place.registry.set_alias("fake", "champion", second.number, who="test", why="newer")
    assert place.until(name).version == 1
    assert place.until(place.submit(input=place.write(rows(10)))).version == 2
    with pytest.raises(BatchError, match="Did you mean 'fake'") as error:
        place.submit(input="x", model="fakee")
    assert error.value.status == 404


def test_a_cancelled_job_keeps_what_was_committed_and_says_so(place):
    name = place.submit(input=place.write(rows(1000)), shard_rows=64)
    place.until(name, "in_progress")
    for _ in range(3):
        place.runner.step(0.0)
    place.service.cancel(place.account, name)
    job = place.until(name)
    assert (job.status, 0 < job.shard_done < 16) == ("cancelled", True)
    made = manifest(job)
    assert (made["status"], made["is_complete"]) == ("cancelled", False)
    assert len(made["parts"]) == job.shard_done
    assert sum(part["rows"] for part in made["parts"]) == job.row_done
    assert not Path(job.folder, SUCCESS).exists()
    assert sorted(os.listdir(Path(job.folder, "parts"))) == [
        part["name"].partition("/")[2] for part in made["parts"]
    ]
    assert place.service.cancel(place.account, name).status == "cancelled"


def test_a_job_that_is_cancelled_before_it_began_is_cancelled(place):
    name = place.submit(input=place.write(rows(10)))
    assert place.service.cancel(place.account, name).status == "cancelling"
    assert place.until(name).status == "cancelled"


def test_a_job_whose_window_is_over_expires(place):
    name = place.submit(input=place.write(rows(1000)), shard_rows=64, window_s=60)
    place.until(name, "in_progress")
    place.runner._clock = lambda: 4e9
    place.runner._refresh_at_s = 0.0
    job = place.until(name)
    assert (job.status, json.loads(job.problems)[0]["code"]) == ("expired", "expired")
    assert job.shard_done == len(manifest(job)["parts"]) < 16


def test_a_small_job_of_somebody_else_does_not_wait_for_a_flood(place):
    bob = place.user("bob")
    place.accounts.allow_input("bob", str(place.data), who="test")
    flood = place.submit(input=place.write(rows(64 * 40)), shard_rows=64)
    place.until(flood, "in_progress")
    for _ in range(5):
        place.runner.step(0.0)
    given = len(place.pool.given)
    small = place.submit(bob, input=place.write(rows(10), "small.parquet"))
    while place.service.job(bob, small).is_active:
        place.runner._refresh_at_s = 0.0
        place.runner.step(0.0)
    jobs = [task.get("output", {}).get("job") for task in place.pool.given[given:]]
    # Planned and computed in two rounds of two predictors, and perhaps one that had begun.
    assert jobs.index(small) <= 6
    assert place.service.job(place.account, flood).is_active
    assert place.until(flood).status == "completed"
    served = {name for name, seconds in place.runner.snapshot()["served_s"].items() if seconds}
    assert served == {"ada", "bob"}


def test_a_lost_predictor_costs_time_only(place):
    path = place.write(rows(640))
    undisturbed = place.until(place.submit(input=path, shard_rows=64))
    seen = []

    def lose(task):
        key = (task["kind"], task.get("shard"))
        seen.append(key)
        return seen.count(key) <= 2 and (task.get("shard") or 0) % 3 == 0

    place.pool.lose = lose
    job = place.until(place.submit(input=path, shard_rows=64))
    assert job.status == "completed"
    assert hashes(job) == hashes(undisturbed)
    assert len(seen) == 11 + 2 * 5


def test_a_shard_that_no_predictor_survives_fails_the_job(place):
    place.pool.lose = lambda task: task.get("shard") == 2
    job = place.until(place.submit(input=place.write(rows(300)), shard_rows=64))
    (problem,) = json.loads(job.problems)
    assert (job.status, problem["code"]) == ("failed", "predictor_lost")


def test_an_input_that_changes_after_planning_fails_the_job(place):
    path = place.write(rows(300))
    name = place.submit(input=path, shard_rows=64)
    place.until(name, "in_progress")
    place.write(rows(301))
    job = place.until(name)
    assert (job.status, json.loads(job.problems)[0]["code"]) == ("failed", "input_changed")


def test_locations_are_checked_when_submitted_and_when_opened(place, tmp_path):
    path = place.write(rows(100))
    secret = tmp_path / "secret.parquet"
    pq.write_table(rows(5), secret)
    link = place.data / "link.parquet"
    link.symlink_to(secret)
    for bad in (
        str(secret),
        str(link),
        f"{place.data}/../../secret.parquet",
        f"file://{path}",
        "http://169.254.169.254/latest/meta-data",
        "s3://bucket/x.parquet",
        "relative.parquet",
        f"{place.data}x/in.parquet",
    ):
        with pytest.raises(LocationError) as error:
            place.submit(input=bad)
        assert error.value.status == 403
    # Allowed when submitted, a link to somewhere else when opened.
    name = place.submit(input=path)
    os.replace(link, path)
    job = place.until(name)
    assert (job.status, json.loads(job.problems)[0]["code"]) == ("failed", "location_refused")
    # Allowed when planned, not any more when the shards come.
    name = place.submit(input=place.write(rows(1000), "y.parquet"), shard_rows=64)
    place.until(name, "in_progress")
    place.accounts.forbid_input("ada", str(place.data), who="test")
    assert place.until(name).status == "failed"


def test_an_output_goes_where_its_user_may_write(place):
    path = place.write(rows(10))
    job = place.until(place.submit(input=path, output=str(place.folder / "out/ada/mine")))
    assert job.folder == str(place.folder / "out/ada/mine" / job.id)
    assert output(job).num_rows == 10
    for bad in (str(place.folder / "out/bob"), str(place.data), "/etc", "s3://bucket/x"):
        with pytest.raises(LocationError):
            place.submit(input=path, output=bad)


def test_uploads_are_inputs_and_are_ones_own(place):
    table = rows(50)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    file = place.service.files.upload(place.account, "x.parquet", [data[:100], data[100:]])
    assert b"".join(place.service.files.content(place.account, file.id)) == data
    job = place.until(place.submit(input=file.id))
    assert output(job)["id"].to_pylist() == table["id"].to_pylist()
    bob = place.user("bob")
    for call in (
        lambda: place.service.files.one(bob, file.id),
        lambda: place.service.files.content(bob, file.id),
        lambda: place.service.files.delete(bob, file.id),
        lambda: place.service.job(bob, job.id),
        lambda: place.service.cancel(bob, job.id),
        lambda: place.service.output(bob, job.id),
        lambda: place.service.part(bob, job.id, "parts/part-00000.parquet"),
        lambda: place.submit(bob, input=file.id),
    ):
        with pytest.raises(BatchError) as error:
            call()
        assert error.value.status == 404
    assert place.service.jobs(bob) == ([], False)
    assert place.service.files.page(bob) == ([], False)
    place.service.files.delete(place.account, file.id)
    assert not Path(file.path).exists()


def test_an_upload_that_is_too_large_leaves_nothing(tmp_path):
    place = Place(tmp_path / "place")
    files = place.service.files
    files.settings = replace(files.settings, max_upload_bytes=10)
    with pytest.raises(BatchError) as error:
        files.upload(place.account, "x.csv", [b"12345"] * 3)
    assert error.value.status == 413
    assert os.listdir(place.folder / "service/files") == []
    for bad in ({"purpose": "fine-tune"}, {"name": "x.exe"}, {"name": "x\n.csv"}):
        with pytest.raises(BatchError):
            files.upload(place.account, **{"name": "x.csv", "blocks": [b""], **bad})
    place.close()


def test_parts_are_fetched_by_the_names_of_the_manifest_only(place):
    job = place.until(place.submit(input=place.write(rows(10))))
    part = b"".join(place.service.part(place.account, job.id, "parts/part-00000.parquet"))
    assert part == Path(job.folder, "parts/part-00000.parquet").read_bytes()
    for bad in ("../../lockstep.db", "parts/../../x", "/etc/passwd", "parts/.tmp/x", ""):
        with pytest.raises(BatchError) as error:
            place.service.part(place.account, job.id, bad)
        assert error.value.status == 404


def test_quotas_say_when_to_come_back(tmp_path):
    quotas = Quotas(queued_jobs=2, rows_per_day=25, bytes=5_000, concurrent_shards=1)
    place = Place(tmp_path / "place", quotas=quotas)
    path = place.write(rows(20))
    first, second = place.submit(input=path), place.submit(input=path)
    with pytest.raises(QuotaExceeded) as error:
        place.submit(input=path)
    assert (error.value.status, error.value.code) == (429, "queued_jobs")
    assert error.value.retry_after_s > 0
    assert place.until(first).status == "completed"
    job = place.until(second)  # 20 rows more than 25
    assert (job.status, json.loads(job.problems)[0]["code"]) == ("failed", "quota_rows_per_day")
    with pytest.raises(QuotaExceeded) as error:
        place.service.files.upload(place.account, "x.csv", [b"0" * 6_000])
    assert error.value.code == "bytes"
    assert os.listdir(place.folder / "service/files") == []
    place.close()


def test_outputs_that_the_service_keeps_are_bounded_while_they_grow(tmp_path):
    """Others that lie in a place of the user's own are the user's affair."""
    place = Place(tmp_path / "place", quotas=Quotas(bytes=6_000))
    path = place.write(rows(3_000))
    own = place.until(
        place.submit(input=path, shard_rows=100, output=str(place.folder / "out/ada/own"))
    )
    assert own.status == "completed", own.problems
    assert place.service._store.stored_bytes("ada") == 0
    kept = place.until(place.submit(input=path, shard_rows=100))
    (why,) = json.loads(kept.problems)
    assert (kept.status, why["code"]) == ("failed", "quota_bytes")
    assert "6,000 bytes that may be stored" in why["message"]
    assert kept.output_bytes < own.output_bytes
    place.close()


def test_what_an_upload_leaves_where_the_database_fails_is_nothing(place, monkeypatch):
    def fail(*_):
        raise DatabaseFailure("down")

    monkeypatch.setattr(place.service._store, "add_file", fail)
    with pytest.raises(DatabaseFailure):
        place.service.files.upload(place.account, "x.csv", [b"a,b\n1,2\n"])
    assert os.listdir(place.folder / "service/files") == []


@pytest.mark.parametrize(
    "values",
    [
        {"modell": 1},
        {"on_error": "ignore"},
        {"max_error_rate": 2},
        {"metadata": {"x": "y" * 600}},
        {"input": []},
        {"input": ["file-1", "/x"]},
    ],
)
def test_requests_are_checked(place, values):
    with pytest.raises(UserError):
        place.submit(**{"input": place.write(rows(5)), **values})


def test_files_are_removed_when_their_time_is_over(place):
    file = place.service.files.upload(place.account, "x.csv", [b"a\n"], expires_after_s=-1)
    place.service.files.sweep()
    assert not Path(file.path).exists()
    with pytest.raises(BatchError):
        place.service.files.one(place.account, file.id)


def test_the_loop_begins_anew_after_a_failure_that_nobody_expected(place):
    name = place.submit(input=place.write(rows(200)), shard_rows=64)
    real, stop = place.runner.step, threading.Event()
    failures = iter([ZeroDivisionError("a mistake of ours"), EnvironmentFailure("the database")])

    def step(timeout_s):
        real(timeout_s)
        for failure in failures:
            raise failure
        if not place.service.job(place.account, name).is_active:
            stop.set()

    place.runner.step = step
    place.runner.run(stop, 0.0)
    job = place.service.job(place.account, name)
    assert (job.status, output(job).num_rows) == ("completed", 200)
    assert not place.runner.snapshot()["is_owner"]


def test_outputs_are_removed_when_their_time_is_over_or_the_user_says_so(place):
    path = place.write(rows(20))
    expiring = place.until(place.submit(input=path, output_expires_after_s=60))
    kept = place.until(place.submit(input=path))
    place.service.sweep()
    assert Path(expiring.folder).exists()
    place.service._clock = lambda: 4e9
    place.service.sweep()
    assert not Path(expiring.folder).exists()
    assert Path(kept.folder).exists()
    with pytest.raises(BatchError) as error:
        place.service.output(place.account, expiring.id)
    assert error.value.status == 404
    assert place.service.delete_output(place.account, kept.id).output_bytes == 0
    assert place.service.delete_output(place.account, kept.id).status == "completed"
    assert os.listdir(place.folder / "service/outputs") == []
    with pytest.raises(BatchError):
        place.service.delete_output(place.user("bob"), kept.id)


def test_predictors_come_with_work_and_leave_after_a_while(place):
    now = [1000.0]
    place.runner._monotonic = lambda: now[0]
    place.until(place.submit(input=place.write(rows(1000)), shard_rows=64))
    assert place.pool.most == 2
    place.runner.step(0.0)
    assert len(place.pool.idle()) > 0
    now[0] += 61
    place.runner._store.renew(place.runner._turns.state.epoch, 0.0, 1e10)
    place.runner.step(0.0)
    assert place.pool.idle() == []
