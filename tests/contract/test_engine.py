"""Which version answers: aliases that move, memory that is full, models that cannot be loaded."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.engine import EngineLimits
from serving.errors import NotFound, Unavailable
from serving.lane import LaneLimits
from serving.metrics import Metrics
from serving.service import ServiceLimits
from tests.support.service import Service, load_small, running_service

BODY = {"instances": [{"a": 1, "b": 0}]}


def run(
    folder: Path, scenario: Callable[[Service], Coroutine[Any, Any, None]], **options: Any
) -> None:
    async def whole() -> None:
        async with asyncio.timeout(60), running_service(folder, **options) as service:
            await scenario(service)

    asyncio.run(whole())


async def predicted(service: Service, path: str = "/v1/models/m:predict") -> float:
    response = await service.client.post(path, json=BODY)
    assert response.status_code == 200, response.text
    return float(response.json()["predictions"][0][0])


def test_an_alias_moves_and_rolls_back_without_a_failed_request(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        for factor in (1.0, 2.0):
            service.register("m", factor=factor)
        service.promote("m", 1)
        await service.moved("m", 1)
        seen: list[float] = []
        is_over = asyncio.Event()

        async def ask() -> None:
            while not is_over.is_set():
                seen.append(await predicted(service))

        async def some() -> int:
            """Enough answers that those asked for before have come; how many there are."""
            target = len(seen) + 24
            while len(seen) < target:
                await asyncio.sleep(0.001)
            return len(seen)

        askers = [asyncio.create_task(ask()) for _ in range(8)]
        before = await some()
        service.promote("m", 2)
        await service.moved("m", 2)
        moved = await some()
        service.registry.rollback("m", who="test", why="test")
        await service.moved("m", 1)
        back = await some()
        is_over.set()
        await asyncio.gather(*askers)
        assert set(seen[:before]) == {1.0}
        assert set(seen[moved - 8 : moved]) == {2.0}
        assert set(seen[back - 8 :]) == {1.0}
        assert await predicted(service, "/v1/models/m/versions/2:predict") == 2.0

    run(tmp_path, scenario)


def test_requests_meet_the_old_version_until_the_new_one_is_warm(tmp_path: Path) -> None:
    loading = asyncio.Event()

    def load(folder: Path) -> Any:
        predictor = load_small(folder)
        if predictor.predict({"a": [1], "b": [0]})[0, 0] == 2.0:
            loop.call_soon_threadsafe(loading.set)
            time.sleep(0.3)
        return predictor

    async def scenario(service: Service) -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        service.register("m")
        service.register("m", factor=2.0)
        service.promote("m", 1)
        await service.moved("m", 1)
        assert await predicted(service) == 1.0
        service.promote("m", 2)
        await service.services.engine.refresh()
        await loading.wait()
        begin = time.monotonic()
        assert await predicted(service) == 1.0
        assert time.monotonic() - begin < 0.25
        await service.moved("m", 2)
        assert await predicted(service) == 2.0

    loop: asyncio.AbstractEventLoop
    run(tmp_path, scenario, load=load)


def test_an_alias_stays_where_it_was_if_the_new_version_cannot_be_loaded(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        service.register("m")
        service.register("m", factor=-1.0)  # cannot be loaded
        service.promote("m", 1)
        await service.moved("m", 1)
        assert await predicted(service) == 1.0
        service.promote("m", 2)
        engine = service.services.engine
        for _ in range(50):
            await engine.refresh()
            await asyncio.sleep(0.01)
        assert engine.number_of("m") == 1
        assert await predicted(service) == 1.0
        loads = service.services.metrics.loads.values
        assert loads["m", "2", "failed"] == 1  # not again with each look
        with pytest.raises(Unavailable):
            await engine.model("m", 2)
        response = await service.client.post("/v1/models/m/versions/2:predict", json=BODY)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert "no such model" not in response.text  # the log's
        service.promote("m", 1)
        await service.moved("m", 1)

    run(tmp_path, scenario)


def test_models_leave_by_least_use_when_memory_is_full(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        engine = service.services.engine
        for name in ("a", "b", "c"):
            service.promote(name, service.register(name))
            await service.moved(name, 1)
        for name in ("a", "b", "a", "c"):
            assert await predicted(service, f"/v1/models/{name}:predict") == 1.0
        assert [engine.is_loaded(name, 1) for name in "abc"] == [True, False, True]
        assert await predicted(service, "/v1/models/b:predict") == 1.0
        assert [engine.is_loaded(name, 1) for name in "abc"] == [False, True, True]
        assert service.services.metrics.loaded_bytes.values[()] <= 40 * 2**20

    run(tmp_path, scenario, engine=EngineLimits(memory_bytes=40 * 2**20))


def test_models_that_come_in_at_once_stay_within_the_memory(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        engine = service.services.engine
        for name in "abcd":
            service.promote(name, service.register(name))
            await service.moved(name, 1)
        most = 0.0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, service.services.metrics.loaded_bytes.values.get((), 0.0))
                await asyncio.sleep(0)

        watcher = asyncio.create_task(watch())
        paths = [f"/v1/models/{name}:predict" for name in "abcd"]
        assert await asyncio.gather(*(predicted(service, path) for path in paths)) == [1.0] * 4
        watcher.cancel()
        assert sum(engine.is_loaded(name, 1) for name in "abcd") == 2
        assert most <= 40 * 2**20

    run(tmp_path, scenario, engine=EngineLimits(memory_bytes=40 * 2**20))


def test_a_version_that_cannot_be_loaded_drives_others_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(service: Service) -> None:
        engine, loads = service.services.engine, service.services.metrics.loads
        for name, factor in (("good", 1.0), ("broken", -1.0)):
            service.promote(name, service.register(name, factor=factor))
            await service.moved(name, 1)
        for attempt in range(4):
            assert await predicted(service, "/v1/models/good:predict") == 1.0
            refused = await service.client.post("/v1/models/broken:predict", json=BODY)
            assert refused.status_code == 503
            assert 20 <= int(refused.headers["retry-after"]) <= 30
            assert engine.is_loaded("good", 1) == (attempt > 0)
        assert loads.values["broken", "1", "failed"] == 1
        waits = []
        for _ in range(7):  # it is tried again when the wait is over, ever more rarely
            now.shift += 1_000
            refused = await service.client.post("/v1/models/broken:predict", json=BODY)
            waits.append(int(refused.headers["retry-after"]))
        assert waits == [60, 120, 240, 480, 960, 960, 960]
        assert loads.values["broken", "1", "failed"] == 8

    now = _Shifted()
    monkeypatch.setattr("serving.engine.time", now)
    run(tmp_path, scenario, engine=EngineLimits(memory_bytes=20 * 2**20))


class _Shifted:
    """The clock of the engine, set forward by a test."""

    shift = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.shift


def test_requests_outlive_the_unloading_of_their_model(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        for name in ("a", "b"):
            service.promote(name, service.register(name))
            await service.moved(name, 1)
        live = await service.services.engine.model("a", 1)
        await service.services.engine.model("b", 1)  # there is room for one
        assert not service.services.engine.is_loaded("a", 1)
        rows = np.array([[3.0, 1.0]], np.float32)
        out = await service.services.engine.predict(live, rows, "ana", time.monotonic() + 30)
        assert out.tolist() == [[13.0]]

    run(tmp_path, scenario, engine=EngineLimits(memory_bytes=20 * 2**20))


def test_many_who_wait_for_a_model_load_it_once(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        service.promote("m", service.register("m"))
        await service.moved("m", 1)
        assert set(await asyncio.gather(*(predicted(service) for _ in range(20)))) == {1.0}
        assert service.services.metrics.loads.values["m", "1", "loaded"] == 1
        requests = service.services.metrics.batch_requests.values["m", "1"]
        assert requests[-1] == 20
        assert sum(requests[:-1]) < 20  # they were computed together

    run(tmp_path, scenario)


def test_what_is_not_there_or_was_deleted(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        engine = service.services.engine
        service.register("m")
        service.register("m", factor=2.0)
        await engine.refresh()
        with pytest.raises(NotFound, match="no alias 'champion'"):
            engine.number_of("m")
        service.promote("m", 2)
        await service.moved("m", 2)
        assert await predicted(service, "/v1/models/m/versions/1:predict") == 1.0
        service.registry.delete("m", 1)
        await engine.refresh()
        assert not engine.is_loaded("m", 1)
        for path in ("m/versions/1", "m/versions/7", "m/labels/canary", "n", "m/versions/x"):
            response = await service.client.post(f"/v1/models/{path}:predict", json=BODY)
            assert response.status_code == 404, path
            assert set(response.json()) == {"error", "code"}
        service.registry.set_alias("m", "champion", None, who="t", why="t")
        await engine.refresh()
        with pytest.raises(NotFound):
            engine.number_of("m")

    run(tmp_path, scenario)


def test_a_full_queue_and_a_passed_deadline(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        service.promote("m", service.register("m"))
        await service.moved("m", 1)
        await predicted(service)
        slow = await service.services.engine.model("m", 1)
        compute = slow.predictor.predict_rows

        def slowly(rows: Any) -> Any:
            time.sleep(0.1)
            return compute(rows)

        slow.lane._compute = slowly
        path = "/v1/models/m:predict"
        answers = await asyncio.gather(
            *(service.client.post(path, json=BODY) for _ in range(12)),
            service.client.post(path, json=BODY, headers=service.with_key("bob")),
        )
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        assert statuses[-1] == 200  # a flood of one is not another's
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.json()["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        late = await service.client.post(path, json=BODY, headers={"lockstep-timeout-s": "0.02"})
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        tensors = [{"name": n, "datatype": "FP32", "shape": [1], "data": [1.0]} for n in ("a", "b")]
        body = {"inputs": tensors, "parameters": {"timeout": 1000}}
        assert (await service.client.post("/v2/models/m/infer", json=body)).status_code == 504
        for text in ("0", "-1", "x", "nan", "1e9"):
            wrong = await service.client.post(path, json=BODY, headers={"lockstep-timeout-s": text})
            assert wrong.status_code == 400

    run(tmp_path, scenario, engine=EngineLimits(lane=LaneLimits(queue_rows=8)))


def test_the_quota_of_the_day(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        service.promote("m", service.register("m"))
        await service.moved("m", 1)
        service.services.accounts.change("ana", who="t", quotas={"rows_per_day": 3})
        body = {"instances": [[1, 2], [1, 2]]}
        path = "/v1/models/m:predict"
        assert (await service.client.post(path, json=body)).status_code == 200
        await service.services.meter.settle()
        refused = await service.client.post(path, json=body)
        assert (refused.status_code, refused.json()["code"]) == (429, "rows_per_day")
        assert service.services.accounts.rows_today("ana") == 2

    run(tmp_path, scenario)


def test_before_the_end_the_service_is_not_ready_but_answers(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        service.promote("m", service.register("m"))
        await service.moved("m", 1)
        ending = service.services.ending = tmp_path / "ending"
        for is_ending in (False, True, False):
            if is_ending:
                ending.touch()
            else:
                ending.unlink(missing_ok=True)
            for path in ("/readyz", "/v2/health/ready"):
                answer = await service.client.get(path)
                assert answer.status_code == (503 if is_ending else 200), path
                assert answer.json() == {"ready": not is_ending}
            assert (await service.client.get("/livez")).status_code == 200
            assert await predicted(service) == 1.0

    run(tmp_path, scenario)


def test_a_rate_is_shared_among_the_processes_that_run(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        rates = service.services.rates
        assert rates.processes == 1
        Metrics(tmp_path / "metrics", "online-1").save()
        Metrics(tmp_path / "metrics", "dispatcher").save()  # takes no requests
        async with asyncio.timeout(20):
            while rates.processes != 2:  # counted every second
                await asyncio.sleep(0.02)

    run(tmp_path, scenario)


def test_draining_answers_what_is_under_way(tmp_path: Path) -> None:
    async def whole() -> None:
        async with running_service(tmp_path, limits=ServiceLimits()) as service:
            service.promote("m", service.register("m"))
            await service.moved("m", 1)
            await predicted(service)
            live = await service.services.engine.model("m", 1)
            compute = live.predictor.predict_rows
            live.lane._compute = lambda rows: (time.sleep(0.1), compute(rows))[1]
            under_way = asyncio.create_task(predicted(service))
            await asyncio.sleep(0.02)
            await service.services.engine.stop()
            assert await under_way == 1.0
            assert (await service.client.get("/readyz")).status_code == 503
            assert (await service.client.get("/livez")).status_code == 200

    asyncio.run(whole())
