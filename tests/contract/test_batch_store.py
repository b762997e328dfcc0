"""Files, jobs and leases of shards, on both databases."""

import threading
from dataclasses import replace

import pytest

from registry.database import Database
from serving.batch_output import PartFile
from serving.batch_store import BatchStore, new_id
from serving.batch_tables import Job, StoredFile
from serving.errors import BatchError, OwnershipLost, QuotaExceeded
from serving.shard_leases import ShardLeases, files_of
from tests.support.batches import Place, output, rows

COUNTS = ("row_total", "row_done", "row_bad", "shard_total", "shard_done", "output_bytes")


@pytest.fixture
def store(database_url):
    database = Database(database_url)
    yield BatchStore(database)
    database.close()


def job(number=0, user="ada", **values):
    made = Job(
        id=new_id("batch"),
        user_name=user,
        idempotency_key=None,
        request_hash="h",
        request='{"metadata": {}}',
        model="m",
        version=1,
        digest="d",
        priority=0,
        status="validating",
        folder="/nowhere",
        plan=None,
        problems="[]",
        **dict.fromkeys(COUNTS, 0),
        compute_s=0.0,
        position=None,
        eta_s=None,
        output_file=None,
        error_file=None,
        created_at=float(number),
        expires_at=1e9,
    )
    return replace(made, **values)


def alive(_):
    return False


def begun(store, shards=3):
    """An owner with a job of some shards."""
    owner = store.acquire("me", 0.0, 10.0, alive)
    made, _ = store.add_job(job())
    records = [{"first_row": n, "rows": 5, "pieces": [[0, n, n + 5, 5]]} for n in range(shards)]
    assert store.planned(owner, made.id, {"a": 1}, records, 1.0)
    return owner, made.id, ShardLeases(store, owner)


def test_a_plan_is_paid_for_with_it_or_not_at_all(store):
    """A dispatcher that dies in between leaves neither; a second plan is not paid for again."""
    owner = store.acquire("me", 0.0, 10.0, alive)
    made, _ = store.add_job(job())
    paid = []

    def refuse(connection):
        paid.append("refused")
        raise QuotaExceeded("no more rows today", "rows", 1.0)

    records = [{"first_row": 0, "rows": 5, "pieces": [[0, 0, 5, 5]]}]
    with pytest.raises(QuotaExceeded):
        store.planned(owner, made.id, {"a": 1}, records, 1.0, refuse)
    assert store.job(made.id).status == "validating"
    for is_first in (True, False):
        begun_now = store.planned(
            owner, made.id, {"a": 1}, records, 1.0, lambda _: paid.append("paid")
        )
        assert begun_now == is_first
    assert paid == ["refused", "paid"]
    assert store.job(made.id).shard_total == 1


def part(number, size_bytes=7):
    return PartFile(f"parts/part-{number:05d}.parquet", 5, size_bytes, "hash")


def test_one_owns_at_a_time_and_a_superseded_one_changes_nothing(store):
    first = store.acquire("one", 0.0, 10.0, alive)
    assert store.acquire("two", 9.0, 10.0, alive) is None
    store.renew(first, 9.0, 10.0)
    assert store.acquire("two", 18.0, 10.0, alive) is None
    second = store.acquire("two", 20.0, 10.0, alive)
    assert second > first
    with pytest.raises(OwnershipLost):
        store.renew(first, 20.0, 10.0)
    made, _ = store.add_job(job())
    with pytest.raises(OwnershipLost):
        store.move(first, made.id, ("validating",), "failed")
    assert store.job(made.id).status == "validating"
    store.release(first)  # of somebody else's: nothing
    assert store.acquire("one", 21.0, 10.0, alive) is None
    store.release(second)
    third = store.acquire("one", 21.0, 10.0, alive)
    assert third > second
    assert store.acquire("two", 22.0, 10.0, lambda holder: holder == "one") > third


def test_many_ask_and_one_becomes_the_owner(store):
    won = []
    threads = [
        threading.Thread(target=lambda n=n: won.append(store.acquire(f"{n}", 0.0, 10.0, alive)))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won, key=str) == [1, None, None, None, None, None]


def test_a_shard_counts_once_however_often_it_is_told(store):
    owner, name, leases = begun(store)
    first = leases.lease(name, 0, 4, 1.0)
    assert (first.epoch, first.status) == (1, "leased")
    assert leases.lease(name, 0, 4, 1.0) is None
    assert leases.give_back(first, 2.0, "lost", is_failure=True) == 1
    second = leases.lease(name, 0, 5, 3.0)
    assert second.epoch == 2
    assert not leases.report(first, [part(0)], 0, 1.0)  # the late one
    assert leases.report(second, [part(0)], 2, 1.5)
    assert not leases.report(second, [part(0)], 2, 1.5)
    leases.done(second, 4.0)
    leases.done(second, 4.0)
    leases.give_back(second, 5.0, "late", is_failure=True)
    found = store.job(name)
    assert (found.row_done, found.row_bad, found.shard_done) == (5, 2, 1)
    assert (found.output_bytes, found.compute_s) == (7, 1.5)
    (shard, *_) = store.shards(name)
    assert (shard.status, files_of(shard)) == ("done", [part(0)])
    leases.reopen(shard)
    leases.reopen(shard)
    found = store.job(name)
    assert (found.row_done, found.shard_done, found.output_bytes) == (0, 0, 0)
    assert leases.lease(name, 0, 5, 6.0).epoch == 3


def test_a_new_owner_takes_leases_back(store):
    owner, name, leases = begun(store)
    held = leases.lease(name, 1, 0, 1.0)
    reported = leases.lease(name, 2, 0, 1.0)
    leases.report(reported, [part(2)], 0, 1.0)
    store.release(owner)
    successor = ShardLeases(store, store.acquire("next", 2.0, 10.0, alive))
    successor.unlease(name, 2.0)
    assert [shard.status for shard in store.shards(name)] == ["pending", "pending", "reported"]
    with pytest.raises(OwnershipLost):
        leases.report(held, [part(1)], 0, 1.0)
    with pytest.raises(OwnershipLost):
        leases.lease(name, 0, 0, 3.0)
    assert successor.lease(name, 1, 0, 3.0).epoch == 2


def test_nothing_is_leased_or_reported_for_a_job_that_is_cancelled(store):
    owner, name, leases = begun(store)
    held = leases.lease(name, 0, 0, 1.0)
    assert store.ask_to_cancel(name, 2.0).status == "cancelling"
    assert leases.lease(name, 1, 0, 3.0) is None
    assert not leases.report(held, [part(0)], 0, 1.0)
    assert not store.planned(owner, name, {}, [], 3.0)
    assert store.move(owner, name, ("cancelling",), "cancelled", cancelled_at=4.0)
    assert store.ask_to_cancel(name, 5.0).status == "cancelled"
    assert store.active_jobs() == []


def test_a_key_makes_one_job_also_for_two_at_once(store):
    made = [job(n, idempotency_key="k") for n in range(8)]
    found = []
    threads = [
        threading.Thread(target=lambda each=each: found.append(store.add_job(each)))
        for each in made
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({each.id for each, _ in found}) == 1
    assert sum(is_new for _, is_new in found) == 1
    with pytest.raises(BatchError, match="another request"):
        store.add_job(job(idempotency_key="k", request_hash="other"))
    assert store.add_job(job(user="bob", idempotency_key="k"))[1]
    assert store.recent_job("ada", "h", -1.0).id == found[0][0].id
    assert store.recent_job("ada", "h", 100.0) is None


@pytest.mark.parametrize(
    ("status", "is_found"),
    [
        *(("validating", True), ("in_progress", True), ("finalizing", True), ("completed", True)),
        *(("failed", False), ("expired", False), ("cancelling", False), ("cancelled", False)),
    ],
)
def test_the_same_request_is_a_new_job_where_the_one_before_was_in_vain(store, status, is_found):
    made, _ = store.add_job(job(status=status))
    assert (store.recent_job("ada", "h", -1.0) is not None) == is_found
    earlier, _ = store.add_job(job(-1))
    assert store.recent_job("ada", "h", -2.0).id == (made.id if is_found else earlier.id)


def test_unfinished_jobs_and_stored_bytes_are_bounded(store):
    for number in range(2):
        store.add_job(job(number), 2)
    with pytest.raises(QuotaExceeded) as error:
        store.add_job(job(3), 2)
    assert (error.value.status, error.value.code) == (429, "queued_jobs")
    file = StoredFile("file-1", "ada", "batch", "x", "/x", 60, "", None, 1.0, 5.0)
    store.add_file(file, 100)
    with pytest.raises(QuotaExceeded) as error:
        store.add_file(replace(file, id="file-2"), 100)
    assert error.value.code == "bytes"
    assert [each.id for each in store.expired_files(5.0)] == ["file-1"]
    store.remove_file("file-1")
    assert store.stored_bytes("ada") == 0


def test_pages_follow_each_other_and_hold_ones_own(store):
    names = []
    for number in range(7):
        made, _ = store.add_job(job(number // 2))  # some at the same moment
        names.append(made.id)
        store.add_job(job(number, user="bob"))
    seen, after = [], None
    while page := store.jobs("ada", after, 3):
        seen += [each.id for each in page]
        after = page[-1].id
    assert sorted(seen) == sorted(names)
    assert [store.job(name).created_at for name in seen] == [3, 2, 2, 1, 1, 0, 0]
    assert len(store.jobs(None, None, 50)) == 14


def test_a_job_goes_its_way_and_on_after_a_crash(tmp_path, database_url):
    """The whole service, over each database: half of it by one owner, half by the next."""
    place = Place(tmp_path / "place", url=database_url)
    table = rows(64 * 6)
    name = place.submit(input=place.write(table), shard_rows=64)
    place.until(name, "in_progress")
    place.runner.step(0.0)
    place.runner.abandon()
    place.service._store.release(1)
    found = place.until(name)
    assert (found.status, found.shard_done, found.row_done) == ("completed", 6, 64 * 6)
    assert output(found)["id"].equals(table["id"])
    assert place.service.delete_output(place.account, name).output_bytes == 0
    place.close()


@pytest.mark.parametrize("name", ["\0", "-\0", "_x\0y"])
def test_what_no_database_can_hold_is_not_there(store, name):
    assert store.file(f"file{name}") is None
    assert store.job(f"batch{name}") is None
