"""Numbers for Prometheus, and limits of requests and rows."""

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import DatabaseFailure
from serving.accounts import Account, Quotas
from serving.errors import QuotaExceeded
from serving.limits import RequestRates, RowMeter, retry_after
from serving.metrics import Metrics
from serving.request_log import RequestLog


def user(**quotas: float) -> Account:
    return Account("ana", "user", 1.0, Quotas(**quotas))  # type: ignore[arg-type]


class Time:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_what_prometheus_reads() -> None:
    metrics = Metrics()
    metrics.requests.add(1, "/x", "GET", "200")
    metrics.requests.add(2, "/x", "GET", "200")
    metrics.latency.observe(0.004, "/x")
    metrics.latency.observe(99.0, "/x")
    metrics.queue_rows.set(5, 'm"\\\n', "1")
    lines = metrics.render().splitlines()
    assert 'lockstep_requests_total{route="/x",method="GET",status="200"} 3' in lines
    assert 'lockstep_request_seconds_bucket{route="/x",le="0.002"} 0' in lines
    assert 'lockstep_request_seconds_bucket{route="/x",le="0.005"} 1' in lines
    assert 'lockstep_request_seconds_bucket{route="/x",le="+Inf"} 2' in lines
    assert 'lockstep_request_seconds_sum{route="/x"} 99.004' in lines
    assert 'lockstep_request_seconds_count{route="/x"} 2' in lines
    assert 'lockstep_queue_rows{model="m\\"\\\\\\n",version="1"} 5' in lines


def test_a_client_of_prometheus_understands_it() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    metrics = Metrics()
    metrics.latency.observe(0.3, "/x")
    metrics.loaded.set(1, "m", "2")
    families = {f.name: f for f in text_string_to_metric_families(metrics.render())}
    assert families["lockstep_request_seconds"].type == "histogram"
    assert families["lockstep_requests"].type == "counter"
    (sample,) = families["lockstep_models_loaded"].samples
    assert (sample.labels, sample.value) == ({"model": "m", "version": "2"}, 1.0)


def test_processes_are_added_up_and_those_that_ended_keep_their_counts(tmp_path: Path) -> None:
    mine, other = Metrics(tmp_path, "a"), Metrics(tmp_path, "b")
    for metrics in (mine, other):
        metrics.rows.add(10, "m", "1")
        metrics.batch_rows.observe(4, "m", "1")
        metrics.queue_rows.set(3, "m", "1")
        metrics.save()
    lines = mine.render().splitlines()
    assert 'lockstep_rows_total{model="m",version="1"} 20' in lines
    assert 'lockstep_batch_rows_count{model="m",version="1"} 2' in lines
    assert 'lockstep_queue_rows{model="m",version="1"} 6' in lines
    record = json.loads((tmp_path / "b.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps({**record, "pid": 2**30}))  # nobody's
    (tmp_path / "c.json").write_text("{")
    lines = mine.render().splitlines()
    assert 'lockstep_rows_total{model="m",version="1"} 20' in lines
    assert 'lockstep_queue_rows{model="m",version="1"} 3' in lines


def test_requests_a_second_come_back() -> None:
    time = Time()
    rates = RequestRates(monotonic=time)
    account = user(requests_per_s=2)
    rates.admit(account)
    rates.admit(account)
    with pytest.raises(QuotaExceeded) as refused:
        rates.admit(account)
    assert (refused.value.status, refused.value.code) == (429, "requests_per_s")
    assert refused.value.retry_after_s == pytest.approx(0.5)
    time.now += 0.5
    rates.admit(account)
    rates.admit(Account("bob", "user", 1.0, Quotas(requests_per_s=1)))
    for _ in range(100):
        rates.admit(user())


@given(st.lists(st.floats(0, 3), min_size=1, max_size=200), st.sampled_from([0.5, 1, 3.5, 20]))
def test_no_window_holds_more_than_its_share(waits: list[float], rate: float) -> None:
    time = Time()
    rates = RequestRates(monotonic=time)
    admitted: list[float] = []
    for wait_s in waits:
        time.now += wait_s
        try:
            rates.admit(user(requests_per_s=rate))
            admitted.append(time.now)
        except QuotaExceeded:
            pass
    for index, begin in enumerate(admitted):
        within = [at for at in admitted[index:] if at <= begin + 10]
        assert len(within) <= max(1, rate) + 10 * rate + 1e-6


def test_a_rate_of_several_processes_is_shared_out() -> None:
    rates = RequestRates(4, Time())
    admitted = 0
    for _ in range(100):
        try:
            rates.admit(user(requests_per_s=40))
            admitted += 1
        except QuotaExceeded:
            break
    assert admitted == 10


def test_the_part_of_a_process_follows_their_number() -> None:
    time = Time()
    rates = RequestRates(8, time)
    account = user(requests_per_s=8)

    def admitted() -> int:
        time.now += 10
        for count in range(100):
            try:
                rates.admit(account)
            except QuotaExceeded:
                return count
        return 100

    assert admitted() == 1
    rates.share_among(1)
    assert admitted() == 8
    rates.share_among(4)
    assert admitted() == 2
    rates.share_among(0)
    assert admitted() == 8


def test_processes_are_counted_while_they_leave_numbers(tmp_path: Path) -> None:
    time = Time()
    mine, other, dispatcher = (Metrics(tmp_path, name, time) for name in ("on-a", "on-b", "c"))
    assert Metrics().processes("on-") == mine.processes("on-") == 1
    for metrics in (mine, other, dispatcher):
        metrics.save()
    at = (tmp_path / "on-b.json").stat().st_mtime
    for later_s, count in ((0, 2), (4, 2), (6, 1)):
        time.now = at + later_s
        assert mine.processes("on-") == count


class Ledger:
    """The part of the accounts that the meter uses."""

    def __init__(self) -> None:
        self.rows = 0
        self.is_down = False

    def charge_rows(self, user: str, rows: int, is_forced: bool) -> None:
        if self.is_down:
            raise DatabaseFailure("down")
        assert is_forced
        self.rows += rows

    def rows_today(self, user: str) -> int:
        return self.rows


def test_rows_are_counted_here_and_settled_later() -> None:
    ledger, time = Ledger(), Time()
    meter = RowMeter(ledger, time)  # type: ignore[arg-type]
    account = user(rows_per_day=100)
    assert not meter.knows("ana")
    ledger.rows = 30
    meter.learn("ana", 30)
    meter.charge(account, 60)
    with pytest.raises(QuotaExceeded, match="10 more are allowed today"):
        meter.charge(account, 11)
    assert ledger.rows == 30
    ledger.is_down = True
    with pytest.raises(DatabaseFailure):
        asyncio.run(meter.settle())
    with pytest.raises(QuotaExceeded):
        meter.charge(account, 11)
    ledger.is_down = False
    asyncio.run(meter.settle())
    assert ledger.rows == 90
    ledger.rows = 95  # another process
    asyncio.run(meter.settle())
    assert not meter.knows("ana")  # idle: learnt anew
    meter.learn("ana", 95)
    meter.charge(account, 5)
    time.now += 86_400
    meter.charge(account, 95)  # what was not settled before midnight counts today
    asyncio.run(meter.settle())
    assert ledger.rows == 195


def test_rows_of_refused_requests_are_given_back() -> None:
    ledger, time = Ledger(), Time()
    meter = RowMeter(ledger, time)  # type: ignore[arg-type]
    account = user(rows_per_day=100)
    meter.learn("ana", 0)
    for _ in range(3):
        meter.charge(account, 100)
        meter.give_back(account, 100)
    meter.charge(account, 60)
    asyncio.run(meter.settle())
    meter.give_back(account, 60)  # settled meanwhile
    asyncio.run(meter.settle())
    assert ledger.rows == 0


def test_waits_are_whole_seconds() -> None:
    assert [retry_after(s) for s in (None, 0.0, 0.2, 1.0, 1.01)] == ["1", "1", "1", "1", "2"]


def test_the_log_has_one_line_a_request_and_is_put_aside(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "logs" / "r.jsonl", most_bytes=200)
    for number in range(3):
        log.write(f"id{number}", "ana", "GET", "/v1/models/" + "x" * 600, 200, 0.01)
        log.flush()
    log.close()
    kept = (tmp_path / "logs" / "r.jsonl.1").read_text().splitlines()
    assert json.loads(kept[0])["request_id"] == "id2"
    assert len(json.loads(kept[0])["path"]) == 512
    RequestLog(None).write("id", None, "GET", "/", 200, 0.0)
