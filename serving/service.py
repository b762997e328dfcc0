"""What all routes of the service share: its parts, its bounds, and the way of one prediction.

Owns the order of checks: the right to the model, the version, the values of the rows, the quota,
the queue. Values are checked before rows join those of others, so a request with a bad row is
refused alone, with the row and the column.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.features import Array
from serving.accounts import Account, Accounts
from serving.body_memory import BodyMemory
from serving.engine import Engine, LiveModel
from serving.errors import DeadlineExceeded, InputError, NotFound, Overloaded, RefusedRequest
from serving.limits import RequestRates, RowMeter
from serving.metrics import Metrics
from serving.request_log import RequestLog
from serving.signature import Signature


@dataclass(frozen=True)
class ServiceLimits:
    """Bounds of one request.

    Attributes:
        body_bytes: Of a body as it is sent.
        upload_bytes: Of a body as it is sent to a route of files.
        inflated_bytes: Of a body after gzip or deflate.
        rows: In one request.
        timeout_s: Time for an answer, where the request does not say.
        most_timeout_s: The longest time that a request may ask for, and for a body to come.
        is_metrics_public: Whether /metrics answers without the key of an admin.
    """

    body_bytes: int = 64 * 2**20
    upload_bytes: int = 2 * 2**30
    inflated_bytes: int = 256 * 2**20
    rows: int = 1_000_000
    timeout_s: float = 30.0
    most_timeout_s: float = 300.0
    is_metrics_public: bool = False


@dataclass
class Services:
    """The parts that routes are built from.

    Attributes:
        accounts: Who may ask.
        engine: The models.
        meter: Rows against the quota of the day.
        rates: Requests a second.
        metrics: Numbers for Prometheus.
        log: A line for each request.
        limits: Bounds of a request.
        bodies: Bounds of the bodies of all requests together.
        batches: The service of batch jobs, where there is one: what `batch_routers` takes.
        batch_routers: Makes the routers of batch jobs from `batches` and what tells a request's
            account.
        name: Of the server, for its clients.
        version: Of Lockstep.
        is_draining: Whether this process is about to end.
        ending: A file that is there once the whole service is about to end, or None.
    """

    accounts: Accounts
    engine: Engine
    meter: RowMeter
    rates: RequestRates = field(default_factory=RequestRates)
    metrics: Metrics = field(default_factory=Metrics)
    log: RequestLog = field(default_factory=RequestLog)
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    bodies: BodyMemory = field(default_factory=BodyMemory)
    batches: Any = None
    batch_routers: Callable[..., list[Any]] | None = None
    name: str = "lockstep"
    version: str = "0"
    is_draining: bool = False
    ending: Path | None = None

    @property
    def is_ready(self) -> bool:
        """Whether requests should come here: the registry was read, and no end is near."""
        is_ending = self.is_draining or (self.ending is not None and self.ending.exists())
        return self.engine.is_ready and not is_ending


@dataclass(frozen=True)
class Target:
    """Which version a request is for: by number, by alias, or what `champion` stands for.

    Attributes:
        name: The model.
        version: Its number as it was written, or None.
        alias: An alias, or None.
    """

    name: str
    version: str | None = None
    alias: str | None = None


def find_number(services: Services, account: Account, target: Target) -> int:
    """The number of the version that a request is for, if its user may know of the model.

    Raises:
        NotFound: There is no such model or alias, or the user has no grant for it: these are not
            told apart.
    """
    is_known = services.engine.knows(target.name)
    if not is_known or not services.accounts.may_use(account, target.name):
        raise NotFound(f"there is no model {target.name!r}.")
    if target.version is None:
        return services.engine.number_of(target.name, target.alias or "champion")
    written = target.version
    if not written.isascii() or not written.isdecimal() or len(written) > 9:
        raise NotFound(f"{target.name!r} has no version {written[:40]!r}; they are 1, 2, ...")
    return int(written)


async def find_model(
    services: Services, account: Account, target: Target, deadline: float
) -> LiveModel:
    """The version in memory that a request is for.

    Raises:
        NotFound: As `find_number`; or there is no such version.
        DeadlineExceeded: It was not loaded in time.
        Unavailable: It cannot be loaded.
    """
    number = find_number(services, account, target)
    if services.engine.is_loaded(target.name, number):
        return await services.engine.model(target.name, number)
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await services.engine.model(target.name, number)
    except TimeoutError:
        raise DeadlineExceeded(
            f"{target.name}/{number} was not loaded before the deadline. Send the request again."
        ) from None


async def predict(
    services: Services, account: Account, live: LiveModel, rows: Array, deadline: float
) -> Array:
    """Predictions for the rows of one request.

    Args:
        services: The parts.
        account: Who asks, and pays.
        live: The version.
        rows: `(rows, *input_shape) float32`, from `live.predictor.rows`.
        deadline: By `time.monotonic()`.

    Returns:
        `(rows, *output_shape) float32`.

    Raises:
        InputError: A value is NaN or infinite.
        RefusedRequest: There are too many rows.
        QuotaExceeded: Today's quota does not hold them.
        Overloaded, DeadlineExceeded, PredictionFailure: As `Lane.predict`.
    """
    count = len(rows)
    if count > services.limits.rows:
        raise RefusedRequest(
            f"received {count} rows; {services.limits.rows} in one request are allowed. Send them "
            "in parts, or as a batch job.",
            413,
            "too_many_rows",
        )
    check_finite(rows, live.predictor.signature)
    if account.quotas.rows_per_day is not None and not services.meter.knows(account.user):
        today = await asyncio.to_thread(services.accounts.rows_today, account.user)
        services.meter.learn(account.user, today)
    services.meter.charge(account, count)
    try:
        return await services.engine.predict(live, rows, account.user, deadline)
    except Overloaded:  # nothing of it was computed
        services.meter.give_back(account, count)
        raise


def check_finite(rows: Array, signature: Signature) -> None:
    """Refuse NaN and infinity, which would make a prediction of nothing.

    Raises:
        InputError: With the first row and its column.
    """
    if np.isfinite(rows).all():
        return
    flat = rows.reshape(len(rows), -1)
    row, element = (int(index) for index in np.argwhere(~np.isfinite(flat))[0])
    column = next(
        feature for feature in reversed(signature.layout.features) if feature.offset <= element
    )
    raise InputError(
        f"row {row}, column {column.name!r}: received {float(flat[row, element])}; finite numbers "
        "of float32 are allowed. Fill the value in, or leave the row out."
    )
