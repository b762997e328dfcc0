"""Two hundred users with mixed load for minutes: nobody sees an error, and memory stays flat.

LOCKSTEP_SOAK_S shortens it.
"""

import asyncio
import collections
import contextlib
import os
import random
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pytest

from serving.accounts import Accounts, Quotas
from serving.bodies import ARROW_STREAM
from tests.support.served import MODEL, Served, prepare, served

USERS = 200
PREDICT = f"/v1/models/{MODEL}:predict"
PARTS = {
    "replica": "lockstep:online",
    "dispatcher": "lockstep:dispatcher",
    "predictor": "cluster.station",
}
JOBS_END_S = 400
ENDED = ("completed", "failed", "expired", "cancelled")

pytestmark = [pytest.mark.long, pytest.mark.timeout(1_200)]


def table(rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    column = pa.table({"x": np.arange(rows, dtype=np.float32)})
    with pa.ipc.new_stream(sink, column.schema) as writer:
        writer.write_table(column)
    return bytes(sink.getvalue())


def memory_bytes(service: Served) -> dict[str, int]:
    """Of each part of the service, without what it shares; 0 where it does not run."""
    found = dict.fromkeys(PARTS, 0)
    for process in psutil.Process(service.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = " ".join(process.cmdline())
            for part, word in PARTS.items():
                if word in words:
                    found[part] += process.memory_full_info().uss
    return found


def test_two_hundred_users(tmp_path: Path) -> None:
    seconds = float(os.environ.get("LOCKSTEP_SOAK_S", "300"))
    prepare(tmp_path)
    with served(tmp_path, "", "--predictors", "1") as service:
        database = service.database()
        accounts = Accounts(database)
        keys = [
            accounts.add(
                f"user{number}",
                who="test",
                quotas=Quotas(requests_per_s=2 if number % 10 == 0 else None),
            )
            for number in range(USERS)
        ]
        database.close()
        statuses: collections.Counter[tuple[str, int]] = collections.Counter()
        samples: list[dict[str, int]] = []
        jobs = asyncio.run(load(service, keys, seconds, statuses, samples))
    for part in PARTS:
        print(part, [sample[part] // 2**20 for sample in samples])
    print(dict(statuses), dict(jobs))
    wrong = {key: count for key, count in statuses.items() if key[1] not in (200, 201, 429)}
    assert wrong == {}
    assert {name for name, _ in statuses} == {"json", "tensor", "table", "job", "status"}
    assert all(statuses[name, 200] or statuses[name, 201] for name, _ in statuses)
    assert set(jobs) == {"completed"}, jobs
    assert len(samples) >= 10
    for part in PARTS:  # a part that is not found would be flat at nothing
        settled = [sample[part] for sample in samples[len(samples) // 3 :]]
        assert min(settled) > 2**20, part
        assert settled[-1] < 1.1 * settled[0] + 20 * 2**20, (part, settled)


async def load(
    service: Served,
    keys: list[str],
    seconds: float,
    statuses: "collections.Counter[tuple[str, int]]",
    samples: list[dict[str, int]],
) -> "collections.Counter[str]":
    """Put the service under load; returns how the jobs ended."""
    jobs: list[tuple[dict[str, str], str]] = []
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=USERS, max_keepalive_connections=USERS)
    async with httpx.AsyncClient(base_url=service.url, timeout=120, limits=limits) as client:

        async def user(number: int) -> None:
            generator = random.Random(number)
            headers = {"authorization": f"Bearer {keys[number]}"}
            while time.monotonic() < until:
                kind = generator.choices(list(CALLS), weights=(60, 20, 10, 1, 9))[0]
                response = await CALLS[kind](client, headers, generator)
                statuses[kind, response.status_code] += 1
                if response.status_code == 201:
                    jobs.append((headers, response.json()["id"]))
                await asyncio.sleep(generator.uniform(0.2, 1.0))

        async def sample() -> None:
            while time.monotonic() < until:
                samples.append(await asyncio.to_thread(memory_bytes, service))
                await asyncio.sleep(seconds / 30)

        await asyncio.gather(sample(), *(user(number) for number in range(len(keys))))
        return await outcomes(client, jobs)


async def outcomes(
    client: httpx.AsyncClient, jobs: list[tuple[dict[str, str], str]]
) -> "collections.Counter[str]":
    """States of all jobs, once they have ended or time is up."""
    until = time.monotonic() + JOBS_END_S
    found: collections.Counter[str] = collections.Counter()
    for headers, name in jobs:
        while True:
            response = await client.get(f"/v1/batches/{name}", headers=headers)
            status = response.json().get("status", f"answer {response.status_code}")
            if status in ENDED or time.monotonic() > until:
                break
            await asyncio.sleep(0.6)
        found[status] += 1
    return found


async def ask_json(client: httpx.AsyncClient, headers: dict[str, str], generator: random.Random):
    body = {"instances": [generator.random() for _ in range(generator.choice((1, 1, 1, 50)))]}
    return await client.post(PREDICT, json=body, headers=headers)


async def ask_tensor(client: httpx.AsyncClient, headers: dict[str, str], generator: random.Random):
    tensor = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, generator.random()]}
    return await client.post(
        f"/v2/models/{MODEL}/infer", json={"inputs": [tensor]}, headers=headers
    )


async def ask_table(client: httpx.AsyncClient, headers: dict[str, str], generator: random.Random):
    headers = {**headers, "content-type": ARROW_STREAM}
    content = table(generator.choice((100, 1_000, 10_000)))
    return await client.post(PREDICT, content=content, headers=headers)


async def ask_job(client: httpx.AsyncClient, headers: dict[str, str], generator: random.Random):
    rows = "x\n" + "\n".join(str(generator.random()) for _ in range(100))
    upload = await client.post("/v1/files?filename=x.csv", content=rows, headers=headers)
    if upload.status_code != 200:
        return upload
    body = {"model": MODEL, "input": upload.json()["id"]}
    return await client.post("/v1/batches", json=body, headers=headers)


async def ask_status(client: httpx.AsyncClient, headers: dict[str, str], generator: random.Random):
    path = generator.choice(
        ("/v1/models", f"/v1/models/{MODEL}", f"/v2/models/{MODEL}", "/v1/batches")
    )
    return await client.get(path, headers=headers)


CALLS = {
    "json": ask_json,
    "tensor": ask_tensor,
    "table": ask_table,
    "job": ask_job,
    "status": ask_status,
}
