"""What strangers and careless users can do to the service: be refused, and nothing else."""

import asyncio
import gzip
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.features import Array
from serving.app import build_app
from serving.bodies import ARROW_STREAM, PARQUET, worked_on
from serving.body_memory import BodyMemory
from serving.service import ServiceLimits
from tests.support.bombs import long_list_parquet, nested_arrow, nested_parquet
from tests.support.service import Service, running_service

BODY = {"instances": [{"a": 1, "b": 0}]}
PREDICT = "/v1/models/m:predict"
LIMITS = ServiceLimits(body_bytes=200_000, inflated_bytes=1_000_000, rows=1_000)
OPEN = {"/", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/openapi.json"}


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("service")
    with asyncio.Runner() as runner:
        context = running_service(folder, limits=LIMITS)
        service = runner.run(context.__aenter__())

        async def begin() -> None:
            for name, layout in (("m", "plain"), ("raw", "raw")):
                service.promote(name, service.register(name, layout))
                await service.moved(name, 1)

        runner.run(begin())
        yield lambda scenario: runner.run(scenario(service))
        runner.run(context.__aexit__(None, None, None))


Call = Callable[[Callable[[Service], Coroutine[Any, Any, Any]]], Any]


async def is_alive(service: Service) -> bool:
    response = await service.client.post(PREDICT, json=BODY)
    return response.status_code == 200 and response.json() == {"predictions": [[1.0]]}


async def every_route(service: Service) -> list[tuple[str, str]]:
    paths = (await service.client.get("/openapi.json")).json()["paths"]
    fill = {
        **{"{name}": "m", "{version}": "1", "{label}": "champion", "{model}": "m"},
        **{"{file}": "file-1", "{batch}": "batch_1", "{part}": "manifest.json"},
    }
    routes = []
    for path, operations in paths.items():
        for placeholder, value in fill.items():
            path = path.replace(placeholder, value)
        routes += [(method.upper(), path) for method in operations]
    return routes


def test_every_route_wants_a_key_that_counts(call: Call) -> None:
    async def scenario(service: Service) -> None:
        accounts = service.services.accounts
        revoked = accounts.add("gone", who="test")
        accounts.revoke("gone", who="test")
        headers = [
            {"authorization": ""},
            {"authorization": "Bearer"},
            {"authorization": "Bearer lk_x"},
            {"authorization": f"Basic {service.keys['ana']}"},
            {"authorization": service.keys["ana"]},
            {"authorization": f"Bearer {revoked}"},
            {"authorization": "Bearer \xff\xfe".encode("latin-1").decode("latin-1")},
        ]
        routes = await every_route(service)
        assert len(routes) > 50
        assert {"/v1/batches", "/openai/v1/files", "/openai/v1/models/m"} <= {p for _, p in routes}
        for method, path in routes:
            for header in headers:
                encoded = {name: value.encode("latin-1") for name, value in header.items()}
                response = await service.client.request(method, path, headers=encoded, content=b"")
                if path in OPEN:
                    assert response.status_code == 200
                    continue
                assert response.status_code == 401, (method, path, header)
                assert response.headers["www-authenticate"] == "Bearer"
                assert revoked not in response.text
        unknown = await service.client.get("/no/such/route", headers={"authorization": ""})
        assert unknown.status_code == 401
        assert await is_alive(service)

    call(scenario)


def test_a_model_without_a_grant_is_as_if_it_did_not_exist(call: Call) -> None:
    async def scenario(service: Service) -> None:
        service.promote("secret", service.register("secret"))
        await service.moved("secret", 1)
        service.services.accounts.withdraw("public", "secret", who="test")
        await service.services.engine.model("secret", 1)
        for method, path in await every_route(service):
            if "/m" not in path or path in OPEN:
                continue
            one = await service.client.request(
                method, path.replace("models/m", "models/secret"), content=b"{}"
            )
            other = await service.client.request(
                method, path.replace("models/m", "models/absent"), content=b"{}"
            )
            assert one.status_code == other.status_code, path
            assert one.text.replace("secret", "absent") == other.text, path
        for path in ("/v1/models", "/v2/models", "/v2/models/stats"):
            assert "secret" not in (await service.client.get(path)).text
        assert "secret" not in (await service.client.post("/v2/repository/index")).text
        root = service.with_key("root")
        assert (
            await service.client.post("/v1/models/secret:predict", json=BODY, headers=root)
        ).status_code == 200
        service.services.accounts.grant("bob", "secret", who="test")
        bob = service.with_key("bob")
        assert (
            await service.client.post("/v1/models/secret:predict", json=BODY, headers=bob)
        ).status_code == 200

    call(scenario)


@pytest.mark.parametrize(
    "name",
    [
        "..%2f..%2fetc%2fpasswd", "m%00", "%2fetc%2fpasswd",
        "m%0d%0ax: y", "a" * 5_000, "%f0%9f%92%a9", "m;drop table users", "m@champion", "*",
    ],
)  # fmt: skip
def test_names_lead_nowhere(call: Call, name: str) -> None:
    async def scenario(service: Service) -> None:
        for method, path in (
            ("POST", f"/v1/models/{name}:predict"),
            ("POST", f"/v1/models/m/versions/{name}:predict"),
            ("POST", f"/v1/models/m/labels/{name}:predict"),
            ("GET", f"/v1/models/{name}"),
            ("GET", f"/v1/models/{name}/metadata"),
            ("GET", f"/v2/models/{name}"),
            ("POST", f"/v2/models/{name}/infer"),
            ("GET", f"/v2/models/m/versions/{name}"),
        ):
            response = await service.client.request(method, path, content=json.dumps(BODY))
            assert response.status_code in (400, 404, 405), (path, response.text)
            assert "root:" not in response.text
            assert "Traceback" not in response.text
        assert await is_alive(service)

    call(scenario)


async def raw(
    service: Service, headers: dict[str, str], chunks: AsyncIterator[bytes], path: str = PREDICT
) -> tuple[int, int]:
    """Status, and how many bytes were read, of a request whose body need not fit its headers."""
    read = 0
    status = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        try:
            chunk = await anext(chunks)
        except StopAsyncIteration:
            return {"type": "http.request", "body": b"", "more_body": False}
        read += len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    key = {"authorization": f"Bearer {service.keys['ana']}"}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "server": ("service", 80),
        "client": ("127.0.0.1", 1),
        "headers": [(k.encode(), v.encode()) for k, v in {**key, **headers}.items()],
    }
    await build_app(service.services)(scope, receive, send)
    return status, read


async def endless(chunk: bytes) -> AsyncIterator[bytes]:
    while True:
        yield chunk


def test_a_declared_giant_is_refused_unread(call: Call) -> None:
    async def scenario(service: Service) -> None:
        for length in (str(10 * 2**30), "9" * 30, "-1", "x"):
            status, read = await raw(service, {"content-length": length}, endless(b"x" * 1000))
            assert (status, read) == (400 if length in ("-1", "x", "9" * 30) else 413, 0)
        giant = {"content-length": str(3 * 2**30)}
        for path in ("/v1/files", "/openai/v1/files", "/v1/batches", "/openai/v1/batches"):
            assert await raw(service, giant, endless(b"x"), path) == (413, 0), path
        assert await is_alive(service)

    call(scenario)


def test_an_endless_stream_is_cut_off(call: Call) -> None:
    async def scenario(service: Service) -> None:
        status, read = await raw(service, {"transfer-encoding": "chunked"}, endless(b" " * 10_000))
        assert status == 413
        assert read <= LIMITS.body_bytes + 10_000
        assert await is_alive(service)

    call(scenario)


def test_a_bomb_does_not_go_off(call: Call) -> None:
    async def scenario(service: Service) -> None:
        bomb = gzip.compress(b" " * 50_000_000)
        assert len(bomb) < LIMITS.body_bytes
        response = await service.client.post(
            PREDICT, content=bomb, headers={"content-encoding": "gzip"}
        )
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
        for path in ("/v1/batches", "/openai/v1/batches", "/v2/models/m/infer"):
            response = await service.client.post(
                path, content=bomb, headers={"content-encoding": "gzip"}
            )
            assert response.status_code == 413, path
        assert service.services.bodies.used_bytes == 0
        assert await is_alive(service)

    call(scenario)


def test_encoded_bodies_of_batch_routes(call: Call) -> None:
    async def scenario(service: Service) -> None:
        files = {"file": ("x.csv", b"a,b\n1,2\n")}
        data = {"purpose": "batch"}
        sent = await service.client.post("/openai/v1/files", files=files, data=data)
        file = sent.json()["id"]
        for path, body, status in (
            ("/v1/batches", {"model": "m", "input": file}, 201),
            (
                "/openai/v1/batches",
                {"endpoint": PREDICT, "input_file_id": file, "completion_window": "24h"},
                200,
            ),
        ):
            content = gzip.compress(json.dumps(body).encode())
            for encoding, wanted in (("gzip", status), ("deflate", 400), ("br", 415)):
                response = await service.client.post(
                    path, content=content, headers={"content-encoding": encoding}
                )
                assert response.status_code == wanted, (path, encoding, response.text)
        packed = gzip.compress(b"a,b\n1,2\n")
        encoded = {"content-encoding": "gzip"}
        for path in ("/v1/files?filename=x.csv", "/openai/v1/files"):
            response = await service.client.post(path, content=packed, headers=encoded)
            assert response.status_code == 415, path
            assert "files are taken as they are" in response.text

    call(scenario)


def test_files_and_jobs_of_others_are_as_if_they_did_not_exist(call: Call) -> None:
    async def scenario(service: Service) -> None:
        sent = await service.client.post("/v1/files?filename=x.csv", content=b"a,b\n1,2\n")
        file = sent.json()["id"]
        body = {"model": "m", "input": file}
        job = (await service.client.post("/v1/batches", json=body)).json()["id"]
        bob = service.with_key("bob")
        tried = 0
        for method, path in await every_route(service):
            if "file-1" not in path and "batch_1" not in path:
                continue
            tried += 1
            mine = path.replace("file-1", file).replace("batch_1", job)
            absent = path.replace("file-1", "file-0").replace("batch_1", "batch_0")
            one = await service.client.request(method, mine, headers=bob)
            other = await service.client.request(method, absent, headers=bob)
            assert one.status_code == other.status_code == 404, (method, path)
            hidden = one.text.replace(file, "file-0").replace(job, "batch_0")
            assert hidden == other.text, (method, path)
        assert tried >= 12
        for path in ("/v1/files", "/v1/batches", "/openai/v1/files", "/openai/v1/batches"):
            assert (await service.client.get(path, headers=bob)).json()["data"] == []
        assert (await service.client.get(f"/v1/batches/{job}")).json()["status"] == "validating"

    call(scenario)


@pytest.mark.parametrize(
    "name", ["..%2f..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "a%00b", "x" * 3_000, "*", "%0d%0a"]
)
def test_names_of_files_jobs_and_parts_lead_nowhere(call: Call, name: str) -> None:
    async def scenario(service: Service) -> None:
        sent = await service.client.post("/v1/files?filename=x.csv", content=b"a,b\n1,2\n")
        body = {"model": "m", "input": sent.json()["id"]}
        job = (await service.client.post("/v1/batches", json=body)).json()["id"]
        paths = [
            *(f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/batches/{name}"),
            *(f"/v1/batches/{name}/output", f"/v1/batches/{job}/output/{name}"),
            *(f"/v1/batches/{job}/output/parts/{name}", f"/openai/v1/batches/{name}"),
            *(f"/openai/v1/files/{name}", f"/openai/v1/models/{name}"),
        ]
        for path in paths:
            response = await service.client.get(path)
            assert response.status_code in (400, 404, 409), (path, response.text)
            assert "root:" not in response.text
            assert "Traceback" not in response.text
        for upload in ("/v1/files", "/openai/v1/files"):
            for called, is_allowed in ((f"../../{name}", False), ("../../../planted.csv", True)):
                files = {"file": (called, b"a,b\n1,2\n")}
                response = await service.client.post(upload, files=files, data={"purpose": "batch"})
                assert (response.status_code == 200) == is_allowed, (upload, response.text)
                assert response.status_code in (200, 400, 422)
        # What a file is called is no path: it lies where all uploads lie, under a name of its own.
        # Other tests' folders around this one may go meanwhile: os.walk passes over those.
        around = os.walk(service.folder.parent.parent)
        planted = [name for _, *names in around for name in sum(names, []) if "planted" in name]
        assert planted == []
        assert await is_alive(service)

    call(scenario)


async def stalled(chunk: bytes, until: asyncio.Event) -> AsyncIterator[bytes]:
    yield chunk
    await until.wait()


def test_bodies_of_one_user_leave_room_for_those_of_others(call: Call) -> None:
    async def scenario(service: Service) -> None:
        bodies = service.services.bodies = BodyMemory(300_000, 150_000)
        go = asyncio.Event()
        declared = {"content-length": "100000"}
        mine = asyncio.create_task(raw(service, declared, stalled(b"{", go)))
        comes = {"transfer-encoding": "chunked"}
        other = service.with_key("bob")
        theirs = asyncio.create_task(raw(service, {**comes, **other}, stalled(b" " * 120_000, go)))
        while bodies.used_bytes < 220_000:
            await asyncio.sleep(0.001)
        packed = gzip.compress(b" " * 60_000)
        content = b" " * 60_000
        for options in (
            {"content": content},
            {"content": packed, "headers": {"content-encoding": "gzip"}},
        ):
            refused = await service.client.post(PREDICT, **options)
            assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
            assert refused.headers["retry-after"] == "1"
            assert "your requests hold" in refused.json()["error"]
        root = service.with_key("root")
        full = await service.client.post(PREDICT, content=b" " * 90_000, headers=root)
        assert full.status_code == 429
        assert "the bodies of all requests" in full.json()["error"]
        assert await is_alive(service)  # small ones go on
        go.set()
        assert (await mine)[0] == (await theirs)[0] == 400
        assert bodies.used_bytes == 0
        service.services.bodies = BodyMemory()

    call(scenario)


def test_keys_are_looked_up_while_large_bodies_are_worked_on(call: Call) -> None:
    async def scenario(service: Service) -> None:
        gate = threading.Event()
        work = [asyncio.create_task(worked_on(lambda: gate.wait(30), 2**20)) for _ in range(100)]
        await asyncio.sleep(0.05)
        try:
            key = service.services.accounts.add("new", who="test")
            headers = {"authorization": f"Bearer {key}"}
            async with asyncio.timeout(10):
                response = await service.client.post(PREDICT, json=BODY, headers=headers)
            assert response.status_code == 200
        finally:
            gate.set()
            await asyncio.gather(*work)

    call(scenario)


def test_a_table_that_claims_many_rows_is_refused_undecoded(call: Call) -> None:
    async def scenario(service: Service) -> None:
        sink = pa.BufferOutputStream()
        rows = 3_000_000
        column = pa.array([1.0]).take(pa.array([0] * rows))
        pq.write_table(pa.table({"a": column, "b": column}), sink)
        body = bytes(sink.getvalue())
        assert len(body) < LIMITS.body_bytes
        response = await service.client.post(
            PREDICT, content=body, headers={"content-type": PARQUET}
        )
        assert (response.status_code, response.json()["code"]) == (413, "too_many_rows")
        many = {"inputs": {"a": [1] * 1_001, "b": [1] * 1_001}}
        assert (await service.client.post(PREDICT, json=many)).status_code == 413
        assert await is_alive(service)

    call(scenario)


def small_table(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue())


def test_a_row_of_many_values_is_refused_undecoded(call: Call) -> None:
    values = 20_000_000
    body = long_list_parquet(values)
    assert len(body) < LIMITS.body_bytes
    pool = pa.default_memory_pool()
    before = pool.max_memory()

    async def scenario(service: Service) -> None:
        response = await service.client.post(
            PREDICT, content=body, headers={"content-type": PARQUET}
        )
        assert response.status_code in (400, 413)
        assert await is_alive(service)

    call(scenario)
    assert pool.max_memory() - before < values


def test_texts_that_repeat_are_not_written_out(call: Call) -> None:
    rows = 900
    long = pa.array(["1970-01-01T12:00:00" + " " * 100_000])
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), long)
    table = pa.table({"a": [1.0] * rows, "carrier": ["AA"] * rows, "time": repeated})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    plain = table.set_column(2, "time", repeated.cast(pa.string()))
    encoding = {"time": "DELTA_BYTE_ARRAY"}
    bodies = [
        (ARROW_STREAM, bytes(sink.getvalue()), 413, "column 'time' would take"),
        (PARQUET, small_table(plain), 413, "column 'time' would take"),
        (
            PARQUET,
            small_table(plain, use_dictionary=["a"], column_encoding=encoding),
            400,
            "encoding 7",
        ),
    ]

    async def scenario(service: Service) -> None:
        for kind, body, status, said in bodies:
            assert len(body) < LIMITS.body_bytes
            response = await service.client.post(
                "/v1/models/raw:predict", content=body, headers={"content-type": kind}
            )
            assert response.status_code == status, response.text
            assert said in response.json()["error"]
        assert await is_alive(service)

    call(scenario)


def test_deep_tables_are_refused(call: Call) -> None:
    bodies = [
        *((PARQUET, nested_parquet(depth)) for depth in (20, 90, 3_000, 20_000)),
        *((ARROW_STREAM, nested_arrow(depth)) for depth in (2, 30, 60)),
    ]

    async def scenario(service: Service) -> None:
        for kind, body in bodies:
            assert len(body) < LIMITS.body_bytes
            response = await service.client.post(
                PREDICT, content=body, headers={"content-type": kind}
            )
            assert response.status_code == 400, response.text
        assert await is_alive(service)

    call(scenario)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"instances": [{f"c{number}": 1 for number in range(1_000)}]}),
        json.dumps({"inputs": {f"c{number}": [1] for number in range(1_000)}}),
        '{"instances": [{"a": NaN, "b": 1}]}',
        '{"instances": [{"a": "x", "b": {}}]}',
        "[" * 50_000 + "]" * 50_000,
        '{"a":' * 20_000 + "1" + "}" * 20_000,
        '{"instances": [{"a": 1, "b": ' + "9" * 5_000 + "}]}",
        '{"instances": [{"a": 1, "b": 1e999}]}',
        '{"instances": [[[[[[[[[[1]]]]]]]]]]}',
        '{"instances": ' + "[" * 70 + "1" + "]" * 70 + "}",
    ],
)
def test_odd_bodies_get_400(call: Call, content: str) -> None:
    async def scenario(service: Service) -> None:
        for path in (PREDICT, "/v2/models/m/infer"):
            response = await service.client.post(path, content=content)
            assert response.status_code == 400, response.text
            assert len(response.text) < 12_000
        assert await is_alive(service)

    call(scenario)


def test_what_was_not_expected_tells_a_request_id_alone(call: Call, caplog: Any) -> None:
    async def scenario(service: Service) -> None:
        live = await service.services.engine.model("m", 1)
        whole = live.predictor.rows
        live.predictor.rows = lambda _: 1 / 0  # type: ignore[method-assign]
        try:
            response = await service.client.post(
                PREDICT, json={"inputs": {"a": [1], "b": [1]}}, headers={"x-request-id": "rq-7"}
            )
        finally:
            live.predictor.rows = whole  # type: ignore[method-assign]
        assert response.status_code == 500
        assert response.headers["x-request-id"] == "rq-7"
        assert "ZeroDivisionError" not in response.text
        assert "rq-7" in response.text
        assert await is_alive(service)

    call(scenario)
    assert "ZeroDivisionError" in caplog.text


def test_request_ids_are_given_and_taken_over(call: Call) -> None:
    async def scenario(service: Service) -> None:
        async def identity(given: str | None) -> str:
            headers = {"x-request-id": given} if given else {}
            response: httpx.Response = await service.client.get("/livez", headers=headers)
            return response.headers["x-request-id"]

        assert await identity("abc-1.2:3") == "abc-1.2:3"
        assert await identity(None) != await identity(None)
        for wrong in ("x" * 65, 'a"b', "a b"):
            assert await identity(wrong) != wrong

    call(scenario)


def test_no_key_in_any_log_and_users_in_the_request_log(call: Call, caplog: Any) -> None:
    async def scenario(service: Service) -> None:
        await service.client.post(f"{PREDICT}?key={service.keys['ana']}", json=BODY)
        await service.client.get("/v1/models", headers={"authorization": "Bearer lk_wrong"})
        service.services.log.flush()
        text = (service.folder / "log" / "requests.jsonl").read_text() + caplog.text
        for key in service.keys.values():
            assert key.split("_", 2)[2] not in text
        assert "lk_wrong" not in text
        last = json.loads(text.splitlines()[-2])
        assert (last["user"], last["path"], last["status"]) == ("ana", PREDICT, 200)

    call(scenario)


def test_metrics_are_for_admins(call: Call) -> None:
    async def scenario(service: Service) -> None:
        assert (await service.client.get("/metrics")).status_code == 403
        response = await service.client.get("/metrics", headers=service.with_key("root"))
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "lockstep_requests_total" in response.text

    call(scenario)


def test_compute_is_told_by_user_and_by_version(call: Call) -> None:
    async def numbers(service: Service) -> dict[str, float]:
        text = (await service.client.get("/metrics", headers=service.with_key("root"))).text
        lines = [line.rpartition(" ") for line in text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, _, value in lines}

    async def scenario(service: Service) -> None:
        users = ('{user="ana"}', '{user="bob"}', '{user="root"}')
        seconds = [f"lockstep_user_compute_seconds_total{user}" for user in users]
        rows = [f"lockstep_user_rows_total{user}" for user in users]
        spent = 'lockstep_batch_seconds_sum{model="m",version="1"}'
        before = await numbers(service)

        async def ask(user: str, count: int) -> None:
            body, headers = {"instances": [[1, 2]] * count}, service.with_key(user)
            answer = await service.client.post(PREDICT, json=body, headers=headers)
            assert answer.status_code == 200

        lane = (await service.services.engine.model("m", 1)).lane
        compute = lane._compute
        is_open = threading.Event()

        def compute_late(rows: Array) -> Array:
            is_open.wait(30)
            time.sleep(0.1)
            return compute(rows)

        lane._compute = compute_late
        try:
            first = asyncio.create_task(ask("root", 1))
            while not lane._in_work:
                await asyncio.sleep(0.001)
            others = asyncio.gather(ask("ana", 3), ask("bob", 40))
            while lane.waiting_rows < 43:  # then these two are in one call
                await asyncio.sleep(0.001)
            is_open.set()
            await asyncio.gather(first, others)
        finally:
            is_open.set()
            lane._compute = compute
        after = await numbers(service)
        more = {name: value - before.get(name, 0.0) for name, value in after.items()}
        assert [more.get(name, 0.0) for name in rows] == [3, 40, 1]
        assert 0.005 < more[seconds[0]] < more[seconds[1]]
        assert sum(more.get(name, 0.0) for name in seconds) == pytest.approx(more[spent], rel=1e-3)

    call(scenario)


def test_a_user_over_the_rate_is_told_when_to_come_back(call: Call) -> None:
    async def scenario(service: Service) -> None:
        key = service.services.accounts.add("slow", who="t")
        service.services.accounts.change("slow", who="t", quotas={"requests_per_s": 1})
        headers = {"authorization": f"Bearer {key}"}
        answers = [await service.client.get("/v1/models", headers=headers) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 429, 429]
        assert answers[1].headers["retry-after"] == "1"
        assert await is_alive(service)

    call(scenario)


def test_methods_that_are_not_offered(call: Call) -> None:
    async def scenario(service: Service) -> None:
        for method, path in (("PUT", "/v1/models"), ("GET", PREDICT), ("DELETE", "/v2/models/m")):
            response = await service.client.request(method, path)
            assert response.status_code == 405, path
            assert response.headers["allow"]
            assert isinstance(response.json()["error"], str)

    call(scenario)


def test_the_description_names_every_status_and_the_key(call: Call) -> None:
    async def scenario(service: Service) -> None:
        schema = (await service.client.get("/openapi.json")).json()
        predict = schema["paths"]["/v1/models/{name}:predict"]["post"]
        wanted = {
            "200",
            "400",
            "401",
            "404",
            "405",
            "409",
            "413",
            "415",
            "422",
            "429",
            "503",
            "504",
        }
        assert wanted <= set(predict["responses"])
        assert schema["security"] == [{"key": []}]
        assert [p["name"] for p in predict["parameters"]] == ["name"]
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                assert operation.get("security") == ([] if path in OPEN else None), path

    call(scenario)
