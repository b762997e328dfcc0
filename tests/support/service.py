"""A prediction service in process: small models of real TensorFlow, a real registry, no Ray.

Batch jobs are taken in; nothing dispatches them.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import tensorflow as tf

from data_pipeline.encoding import Category, Timestamp
from data_pipeline.features import InputColumn, InputLayout
from registry.database import Database
from registry.store import Registry
from serving.accounts import Accounts
from serving.app import build_app
from serving.assembly import at_work
from serving.batch_files import ServiceSettings
from serving.batch_routes import batch_routers
from serving.batch_store import BatchStore
from serving.batches import BatchService
from serving.engine import Engine, EngineLimits
from serving.limits import RequestRates, RowMeter
from serving.metrics import Metrics
from serving.model_file import LoadedModel
from serving.predictor import Predictor
from serving.request_log import RequestLog
from serving.service import ServiceLimits, Services
from serving.signature import Signature
from tests.support.artifacts import write_artifact

PLAIN = InputLayout(
    (InputColumn("a", (), 0, False), InputColumn("b", (), 1, False)), "", "float32", 1, None
)
"""Two columns of numbers; the model gives a + 10 b, times its factor."""

WINDOW = InputLayout((InputColumn("window", (2, 3), 0, False),), "", "float32", 1, None)
"""One column of lists."""

RAW = InputLayout(
    (
        InputColumn("a", (), 0, False),
        InputColumn(
            "carrier", (), 1, False, Category(True, 10, "one_hot", vocabulary=("AA", "UA"))
        ),
        InputColumn("time", (2,), 2, False, Timestamp(("hour",), True)),
    ),
    "",
    "float32",
    1,
    None,
)
"""A number, a category of texts, and a moment."""

LAYOUTS = {"plain": PLAIN, "window": WINDOW, "raw": RAW}


def small_artifact(folder: Path, layout: str = "plain", factor: float = 1.0) -> Path:
    """An artifact that `load_small` makes a predictor of."""
    record = json.dumps({"layout": layout, "factor": factor}).encode()
    return write_artifact(folder, {"small.json": record})


def load_small(folder: Path) -> Predictor:
    """The predictor of such an artifact: the sum of a row, places weighted 1, 10, 100 ..."""
    record = json.loads((folder / "small.json").read_text())
    if record["factor"] < 0:
        raise OSError("no such model")
    layout = LAYOUTS[record["layout"]]
    width = layout.width
    weights = tf.constant([[record["factor"] * 10.0**place] for place in range(width)])

    def call(rows: Any) -> Any:
        return tf.matmul(tf.reshape(rows, [-1, width]), weights)

    return Predictor(LoadedModel(folder, Signature(layout, (1,), None), call), 512)


@dataclass
class Service:
    """A running service and clients to it."""

    services: Services
    registry: Registry
    folder: Path
    client: httpx.AsyncClient
    """With the key of `ana`."""
    keys: dict[str, str]

    def register(self, name: str, layout: str = "plain", factor: float = 1.0) -> int:
        """A new version."""
        artifact = self.folder / f"{name}-{layout}-{factor}-{time.monotonic_ns()}"
        return self.registry.register(name, small_artifact(artifact, layout, factor)).number

    def promote(self, name: str, number: int) -> None:
        """Make a version the champion; the engine does not know before it looks."""
        self.registry.set_alias(name, "champion", number, who="test", why="test")

    async def moved(self, name: str, number: int) -> None:
        """Wait until the engine follows."""
        await self.services.engine.refresh()
        async with asyncio.timeout(20):
            while self.services.engine.number_of(name) != number:
                await asyncio.sleep(0.005)

    def with_key(self, user: str) -> dict[str, str]:
        """Headers with somebody's key."""
        return {"authorization": f"Bearer {self.keys[user]}"}


@contextlib.asynccontextmanager
async def running_service(
    folder: Path,
    *,
    limits: ServiceLimits | None = None,
    engine: EngineLimits | None = None,
    load: Callable[[Path], Predictor] = load_small,
) -> AsyncIterator[Service]:
    """A service with users ana, bob and the admin root, and no model."""
    database = Database(f"sqlite:///{folder / 'service.db'}")
    registry = Registry(database, str(folder / "artifacts"))
    accounts = Accounts(database)
    keys = {name: accounts.add(name, who="test") for name in ("ana", "bob")}
    keys["root"] = accounts.add("root", who="test", role="admin")
    metrics = Metrics(folder / "metrics")
    bounds = replace(engine or EngineLimits(), poll_s=3600)
    services = Services(
        accounts,
        Engine(registry, bounds, metrics, load),
        RowMeter(accounts),
        RequestRates(),
        metrics,
        RequestLog(folder / "log" / "requests.jsonl"),
        limits or ServiceLimits(),
        batches=BatchService(
            BatchStore(database),
            registry,
            accounts,
            ServiceSettings(str(folder / "batches")),
        ),
        batch_routers=batch_routers,
    )
    transport = httpx.ASGITransport(build_app(services), raise_app_exceptions=False)
    try:
        async with (
            at_work(services),
            httpx.AsyncClient(transport=transport, base_url="http://service") as client,
        ):
            service = Service(services, registry, folder, client, keys)
            client.headers.update(service.with_key("ana"))
            yield service
    finally:
        services.log.close()
        database.close()
