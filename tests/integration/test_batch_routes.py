"""The routes of batch jobs, behind the front that every request passes; OpenAI's forms too."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.app import build_app
from serving.batch_routes import batch_routers
from serving.engine import Engine, EngineLimits
from serving.limits import RequestRates, RowMeter
from serving.metrics import Metrics
from serving.request_log import RequestLog
from serving.service import ServiceLimits, Services
from tests.support.batches import Place, expected, rows

ENDPOINT = "/v1/models/fake:predict"


@pytest.fixture
def place(tmp_path):
    found = Place(tmp_path / "place")
    found.user("bob")
    found.accounts.withdraw("public", "secret", who="test")
    found.registry.register("secret", found.folder / "artifact")
    yield found
    found.close()


def clients(test):
    """Runs a test with a client of ada's, and what makes headers of others."""

    def run(place):
        asyncio.run(_with_client(place, test))

    run.__name__ = test.__name__
    return run


@asynccontextmanager
async def client_of(place):
    metrics = Metrics(place.folder / "metrics")
    services = Services(
        place.accounts,
        Engine(place.registry, EngineLimits(), metrics, lambda path: None),
        RowMeter(place.accounts),
        RequestRates(),
        metrics,
        RequestLog(place.folder / "requests.jsonl"),
        ServiceLimits(),
        batches=place.service,
        batch_routers=batch_routers,
    )
    app = build_app(services)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {place.keys['ada']}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://service", headers=headers
    ) as client:
        client.app = app
        yield client


async def _with_client(place, test):
    async with client_of(place) as client:
        await test(place, client)


async def ended(place, client, name):
    """The job when it has ended; the loop runs meanwhile."""
    await asyncio.to_thread(place.until, name)
    return (await client.get(f"/v1/batches/{name}")).json()


def parquet_bytes(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@clients
async def test_a_job_by_upload_and_its_output_by_parts(place, client):
    table = rows(300)
    data = parquet_bytes(table)
    sent = await client.post("/v1/files?filename=x.parquet", content=data)
    file = sent.json()
    assert (sent.status_code, file["bytes"], file["filename"]) == (200, len(data), "x.parquet")
    request = {"model": "fake", "input": file["id"], "shard_rows": 128, "metadata": {"k": "v"}}
    key = {"idempotency-key": "one"}
    made = await client.post("/v1/batches", json=request, headers=key)
    again = await client.post("/v1/batches", json=request, headers=key)
    other = await client.post("/v1/batches", json=request | {"priority": 2}, headers=key)
    assert (made.status_code, again.status_code, other.status_code) == (201, 200, 422)
    assert made.json()["id"] == again.json()["id"]
    assert (made.json()["status"], made.json()["metadata"]) == ("validating", {"k": "v"})
    name = made.json()["id"]
    early = await client.get(f"/v1/batches/{name}/output")
    assert early.status_code == 409
    job = await ended(place, client, name)
    assert (job["status"], job["progress"], job["output"]) == ("completed", 1.0, None)
    manifest = (await client.get(f"/v1/batches/{name}/output")).json()
    assert len(manifest["parts"]) == 3
    found = []
    for part in manifest["parts"]:
        got = await client.get(f"/v1/batches/{name}/output/{part['name']}")
        found.append(pq.read_table(pa.BufferReader(got.content)))
    values = pa.concat_tables(found)["prediction"].to_numpy()
    np.testing.assert_allclose(values, expected(table), rtol=1e-6)
    listed = (await client.get("/v1/batches?limit=1")).json()
    assert ([job["id"] for job in listed["data"]], listed["has_more"]) == ([name], False)
    assert (await client.get(f"/v1/files/{file['id']}/content")).content == data
    assert (await client.delete(f"/v1/files/{file['id']}")).json()["deleted"]
    assert (await client.get(f"/v1/files/{file['id']}")).status_code == 404


@clients
async def test_nobody_touches_what_is_not_his(place, client):
    file = (await client.post("/v1/files?filename=x.csv", content=b"a,b\n1,2\n")).json()["id"]
    request = {"model": "fake", "input": file}
    job = (await client.post("/v1/batches", json=request)).json()["id"]
    routes = [
        ("GET", f"/v1/files/{file}"),
        ("GET", f"/v1/files/{file}/content"),
        ("DELETE", f"/v1/files/{file}"),
        ("GET", f"/v1/batches/{job}"),
        ("POST", f"/v1/batches/{job}/cancel"),
        ("GET", f"/v1/batches/{job}/output"),
        ("GET", f"/v1/batches/{job}/output/manifest.json"),
        ("GET", f"/openai/v1/files/{file}"),
        ("GET", f"/openai/v1/files/{file}/content"),
        ("DELETE", f"/openai/v1/files/{file}"),
        ("GET", f"/openai/v1/batches/{job}"),
        ("POST", f"/openai/v1/batches/{job}/cancel"),
        ("GET", f"/v1/batches?after={job}"),
        ("GET", f"/openai/v1/files?after={file}"),
    ]
    bob = {"authorization": f"Bearer {place.keys['bob']}"}
    for method, path in routes:
        assert (await client.request(method, path, headers=bob)).status_code == 404, path
        for key in ("", "Bearer lk_x", "Basic eA=="):
            refused = await client.request(method, path, headers={"authorization": key})
            assert refused.status_code == 401, path
    for method, path in (("POST", "/v1/batches"), ("POST", "/openai/v1/batches")):
        body = request | {"endpoint": ENDPOINT, "input_file_id": file}
        body = body if "openai" in path else request
        assert (await client.request(method, path, json=body, headers=bob)).status_code == 404
    hidden = await client.post("/v1/batches", json={"model": "secret/1", "input": file})
    assert hidden.status_code == 404
    assert (await client.get(f"/v1/batches/{job}")).json()["status"] == "validating"
    assert (await client.get("/openai/v1/models/secret")).status_code == 404
    names = [model["id"] for model in (await client.get("/openai/v1/models")).json()["data"]]
    assert names == ["fake"]


@clients
async def test_bad_requests_are_answered_with_a_reason(place, client):
    file = (await client.post("/v1/files?filename=x.csv", content=b"a,b\n1,2\n")).json()["id"]
    good = {"model": "fake", "input": file}
    deep = b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for body, status in (
        (b"", 400),
        (b"[]", 400),
        (b"{", 400),
        (deep, 400),
        (json.dumps(good | {"x": 1}).encode(), 422),
        (json.dumps(good | {"input": "/etc/passwd"}).encode(), 403),
        (json.dumps(good | {"input": "http://169.254.169.254/x.csv"}).encode(), 403),
        (json.dumps(good | {"output": "/etc"}).encode(), 403),
        (json.dumps(good | {"input": "file-../../x"}).encode(), 404),
        (json.dumps(good | {"model": "fake@nobody"}).encode(), 404),
        (json.dumps(good | {"model": "a b"}).encode(), 404),
        (json.dumps(good | {"metadata": {"k": "\ud800"}}).encode(), 422),
        (json.dumps(good | {"metadata": {"\udfff": "v"}}).encode(), 422),
        (json.dumps(good | {"\ud800": 1}).encode(), 422),
        (json.dumps(good | {"input": "/x/\ud800.csv"}).encode(), 422),
        (json.dumps(good | {"column": "x" * 300}).encode(), 422),
    ):
        answer = await client.post("/v1/batches", content=body)
        assert (answer.status_code, "error" in answer.json()) == (status, True), body[:80]
    for path, status in (
        ("/v1/files?limit=0", 400),
        ("/v1/files?limit=x", 400),
        ("/v1/files?limit=000000001000000", 400),
        ("/v1/files?limit=1" + "0" * 25, 400),
        ("/v1/batches?limit=" + "9" * 5_000, 400),
        ("/v1/batches?after=batch_x", 404),
        ("/v1/batches/%2e%2e%2fx", 404),
    ):
        assert (await client.get(path)).status_code == status, path
    for name in ("x.exe", "", "../x", "x" * 300 + ".csv"):
        answer = await client.post(f"/v1/files?filename={name}", content=b"1")
        assert answer.status_code == 422, name
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert (await client.post("/v1/files", content=b"--y", headers=form)).status_code in (400, 422)


@clients
async def test_an_upload_expires_after_a_number_of_seconds(place, client):
    for text, status in (
        ("3600", 200),
        ("0000000001" + "9" * 400, 400),
        ("1" * 5_000, 400),
        ("99999999999", 400),
        ("100000000", 400),
        ("0", 400),
        ("-1", 400),
        ("1e3", 400),
        ("inf", 400),
        ("\u0663", 400),
    ):
        sent = await client.post(
            "/openai/v1/files",
            files={"file": ("x.jsonl", b"{}")},
            data={"purpose": "batch", "expires_after[seconds]": text},
        )
        assert sent.status_code == status, text
    listed = await client.get("/openai/v1/files")
    (file,) = listed.json()["data"]
    assert file["expires_at"] - file["created_at"] in (3600, 3601)


@clients
async def test_models_without_a_grant_are_not_told_of(place, client):
    file = (await client.post("/v1/files?filename=x.jsonl", content=b"{}")).json()["id"]
    answers = {}
    for reference in ("secret", "secret/1", "secret/9", "secret@x", "nothing", "secre"):
        name, _, version = reference.replace("@", "/").partition("/")
        kind = "labels" if "@" in reference else "versions"
        url = f"/v1/models/{name}" + (f"/{kind}/{version}" if version else "") + ":predict"
        body = {"endpoint": url, "input_file_id": file, "completion_window": "24h"}
        for answer in (
            await client.post("/v1/batches", json={"model": reference, "input": file}),
            await client.post("/openai/v1/batches", json=body),
        ):
            assert answer.status_code == 404, reference
            assert "secret" not in answer.text.replace(reference, "?"), answer.text
            answers.setdefault(answer.text.replace(reference, "?"), []).append(reference)
    assert len(answers) == 2  # one for each of the two APIs, whatever was asked for
    known = await client.post("/v1/batches", json={"model": "fakee", "input": file})
    assert "Did you mean 'fake'" in known.text


def openai_lines(table):
    for index, row in enumerate(table.to_pylist()):
        columns = {"a": row["a"], "b": row["b"]}
        body = {"instances": [columns]} if index % 2 else {"inputs": columns, "model": "fake"}
        yield {"custom_id": f"c{index}", "method": "POST", "url": ENDPOINT, "body": body}


async def openai_batch(client, lines, endpoint=ENDPOINT):
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    sent = await client.post(
        "/openai/v1/files",
        files={"file": ("requests.jsonl", text.encode())},
        data={"purpose": "batch"},
    )
    assert sent.status_code == 200, sent.text
    request = {
        "input_file_id": sent.json()["id"],
        "endpoint": endpoint,
        "completion_window": "24h",
    }
    return await client.post("/openai/v1/batches", json=request), request


@clients
async def test_openais_batches_answer_each_line(place, client):
    table = rows(120)
    lines = list(openai_lines(table))
    lines[3]["body"] = {"instances": [{"a": "x", "b": 1}]}
    made, request = await openai_batch(client, lines)
    batch = made.json()
    assert (made.status_code, batch["object"], batch["model"]) == (200, "batch", "fake")
    assert batch["completion_window"] == "24h"
    repeated = await client.post("/openai/v1/batches", json=request)
    assert repeated.json()["id"] == batch["id"]  # its client sends again what went unanswered
    await ended(place, client, batch["id"])
    batch = (await client.get(f"/openai/v1/batches/{batch['id']}")).json()
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 120, "completed": 119, "failed": 1}
    content = await client.get(f"/openai/v1/files/{batch['output_file_id']}/content")
    answers = [json.loads(line) for line in content.text.splitlines()]
    found = {a["custom_id"]: a["response"]["body"]["predictions"][0] for a in answers}
    wanted = {f"c{n}": v for n, v in enumerate(expected(table)) if n != 3}
    assert found == pytest.approx(wanted, rel=1e-5)
    content = await client.get(f"/openai/v1/files/{batch['error_file_id']}/content")
    (error,) = [json.loads(line) for line in content.text.splitlines()]
    assert (error["custom_id"], error["error"]["code"]) == ("c3", "not_a_number")


@clients
async def test_openais_batches_tell_bad_lines_by_number(place, client):
    lines = list(openai_lines(rows(6)))
    lines[1] = "{not json\n"
    lines[2]["custom_id"] = "c0"
    lines[3]["url"] = "/v1/models/other:predict"
    lines[4]["body"]["model"] = "other"
    made, _ = await openai_batch(client, lines)
    await ended(place, client, made.json()["id"])
    batch = (await client.get(f"/openai/v1/batches/{made.json()['id']}")).json()
    assert batch["status"] == "failed"
    assert [(e["line"], e["code"]) for e in batch["errors"]["data"]] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "url_mismatch"),
        (5, "model_mismatch"),
    ]
    made, _ = await openai_batch(client, ["\n"])
    job = await ended(place, client, made.json()["id"])
    assert job["errors"]["data"][0]["code"] == "empty_file"
    made, _ = await openai_batch(client, lines, "/v1/chat/completions")
    assert (made.status_code, made.json()["error"]["code"]) == (400, "invalid_endpoint")


@clients
async def test_the_routes_are_described(place, client):
    schema = (await client.get("/openapi.json")).json()
    for path in ("/v1/batches", "/v1/files", "/openai/v1/batches"):
        assert {"200", "401", "404", "422", "429"} <= set(
            schema["paths"][path]["post"]["responses"]
        )
    body = schema["paths"]["/v1/batches"]["post"]["requestBody"]["content"]["application/json"]
    assert "on_error" in body["schema"]["properties"]
