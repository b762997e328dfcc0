"""Two hundred users with mixed load for minutes: nobody sees an error, and memory stays flat.

LOCKSTEP_SOAK_S shortens it.
"""

import asyncio
import collections
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

pytestmark = [pytest.mark.long, pytest.mark.timeout(1_200)]


def table(rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    column = pa.table({"x": np.arange(rows, dtype=np.float32)})
    with pa.ipc.new_stream(sink, column.schema) as writer:
        writer.write_table(column)
    return bytes(sink.getvalue())


def memory_bytes(service: Served) -> int:
    """Of the replica, without what it shares."""
    family = psutil.Process(service.process.pid).children(recursive=True)
    return sum(
        process.memory_full_info().uss
        for process in family
        if "lockstep:online" in " ".join(process.cmdline())
    )


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
        samples: list[int] = []
        asyncio.run(load(service, keys, seconds, statuses, samples))
    print(dict(statuses), [sample // 2**20 for sample in samples])
    wrong = {key: count for key, count in statuses.items() if key[1] not in (200, 201, 429)}
    assert wrong == {}
    assert {name for name, _ in statuses} == {"json", "tensor", "table", "job", "status"}
    assert all(statuses[name, 200] or statuses[name, 201] for name, _ in statuses)
    settled = samples[len(samples) // 3 :]
    assert settled[-1] < 1.1 * settled[0] + 20 * 2**20


async def load(
    service: Served,
    keys: list[str],
    seconds: float,
    statuses: "collections.Counter[tuple[str, int]]",
    samples: list[int],
) -> None:
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
                await asyncio.sleep(generator.uniform(0.2, 1.0))

        async def sample() -> None:
            while time.monotonic() < until:
                samples.append(await asyncio.to_thread(memory_bytes, service))
                await asyncio.sleep(seconds / 30)

        await asyncio.gather(sample(), *(user(number) for number in range(len(keys))))


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
