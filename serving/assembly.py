"""A process of the service put together from plain settings.

Owns what one process makes of a configuration: its database, models, users, numbers and log. The
settings travel to the processes as they are; each opens its own connections.
"""

import asyncio
import contextlib
import importlib.metadata
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.service import ServiceConfig
from registry.database import Database
from registry.errors import DatabaseFailure
from registry.store import Registry
from serving.accounts import Accounts
from serving.batch_files import ServiceSettings
from serving.batch_process import ProcessConfig
from serving.batch_routes import batch_routers
from serving.batch_store import BatchStore
from serving.batches import BatchService, own_outputs
from serving.body_memory import BodyMemory
from serving.engine import Engine, EngineLimits
from serving.errors import RequestError
from serving.lane import LaneLimits
from serving.limits import RequestRates, RowMeter
from serving.metrics import Metrics
from serving.request_log import JsonFormatter, RequestLog
from serving.service import ServiceLimits, Services

_LOG = logging.getLogger(__name__)
_HOUSEKEEPING_S = 1.0
_KIND = "online-"  # of this process, among those that leave numbers


@dataclass(frozen=True)
class Settings:
    """What a process of the service is told.

    Attributes:
        config: The configuration.
        folder: For logs, numbers, uploads and outputs; absolute.
        version: Of Lockstep.
    """

    config: ServiceConfig
    folder: str
    version: str


def settings_for(config: ServiceConfig) -> Settings:
    """The settings of the service's processes; its folder is made.

    Raises:
        UserError: The folder cannot be made.
    """
    folder = Path(config.folder) if config.folder else home() / "service"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make {folder}: {error}. Set folder, or LOCKSTEP_HOME, to a place that can be "
            "written to."
        ) from error
    return Settings(config, str(folder.absolute()), importlib.metadata.version("lockstep"))


def ending_file(settings: Settings) -> Path:
    """The file that tells all processes of the service that it is about to end."""
    return Path(settings.folder) / "ending"


def home() -> Path:
    """Where everything is that was not told another place."""
    return Path(os.environ.get("LOCKSTEP_HOME") or Path.home() / ".lockstep")


def batch_config(settings: Settings) -> ProcessConfig:
    """What the service and the dispatching of batch jobs are made of."""
    config, folder = settings.config, Path(settings.folder)
    most = (os.cpu_count() or 1) if config.predictors is None else config.predictors
    return ProcessConfig(
        database=config.database,
        artifacts=config.artifacts,
        service={
            "folder": str(folder / "batches"),
            "outputs": config.outputs,
            "max_upload_bytes": config.max_upload_bytes,
        },
        runner={"max_predictors": most},
        models_bytes=config.model_memory_bytes,
        log_file=str(folder / "logs" / "predictors.log"),
        pool=config.predictor_pool,
        gpus=config.predictor_gpus,
    )


def build_services(settings: Settings) -> Services:
    """The parts of one process; nothing is started.

    Raises:
        RegistryError: The URL of the database is none.
        DatabaseFailure: The database failed.
    """
    config, folder = settings.config, Path(settings.folder)
    database = Database(config.database)
    registry = Registry(database, config.artifacts)
    accounts = Accounts(database)
    metrics = Metrics(folder / "metrics", f"{_KIND}{os.getpid()}-{os.urandom(4).hex()}")
    limits = EngineLimits(
        config.model_memory_bytes,
        config.poll_s,
        LaneLimits(config.queue_rows, config.batch_rows),
        config.drain_s,
    )
    batches = None
    if config.predictors != 0:
        bounds = ServiceSettings(**batch_config(settings).service)
        batches = BatchService(
            BatchStore(database, own_outputs(bounds.folder)), registry, accounts, bounds
        )
    return Services(
        accounts=accounts,
        engine=Engine(registry, limits, metrics),
        meter=RowMeter(accounts),
        rates=RequestRates(config.replicas),  # until they were counted
        metrics=metrics,
        log=RequestLog(folder / "logs" / f"requests-{os.getpid()}.jsonl"),
        limits=ServiceLimits(
            config.max_body_bytes,
            config.max_upload_bytes,
            config.max_inflated_bytes,
            config.max_rows,
            config.timeout_s,
            config.max_timeout_s,
            config.is_metrics_public,
        ),
        bodies=BodyMemory(config.max_bodies_bytes, config.max_user_bodies_bytes),
        batches=batches,
        batch_routers=batch_routers,
        version=settings.version,
        ending=ending_file(settings),
    )


@asynccontextmanager
async def at_work(services: Services, preload: tuple[str, ...] = ()) -> AsyncIterator[None]:
    """The parts of a process started, and stopped with what is under way answered.

    Raises:
        DatabaseFailure: The registry cannot be read.
    """
    await services.engine.start()
    with contextlib.suppress(OSError):  # said again every second, then with a warning
        services.metrics.save()
    for name in preload:
        try:
            await services.engine.model(name, services.engine.number_of(name))
        except RequestError as error:
            _LOG.warning("%s is not loaded in advance: %s", name, error)
    keeper = asyncio.create_task(_keep_house(services))
    try:
        yield
    finally:
        services.is_draining = True
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await services.engine.stop()
        with contextlib.suppress(DatabaseFailure, OSError):
            await _settle(services)
        services.log.close()


async def _keep_house(services: Services) -> None:
    while True:
        await asyncio.sleep(_HOUSEKEEPING_S)
        try:
            await _settle(services)
        except (DatabaseFailure, OSError) as error:
            _LOG.warning("numbers wait to be written: %s", error)


async def _settle(services: Services) -> None:
    services.log.flush()
    services.metrics.save()
    services.rates.share_among(services.metrics.processes(_KIND))
    await services.meter.settle()


def log_to(folder: Path) -> None:
    """Write the lines of this process's own loggers as JSON into a folder."""
    logger = logging.getLogger(__package__)
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logger.handlers):
        return
    folder.mkdir(parents=True, exist_ok=True)
    handler: logging.Handler = logging.FileHandler(folder / f"service-{os.getpid()}.jsonl")
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as plain values, for another process; `settings_of` reads them."""
    return {
        "config": settings.config.model_dump(mode="json"),
        "folder": settings.folder,
        "version": settings.version,
    }


def settings_of(values: dict[str, Any]) -> Settings:
    """Settings from what `plain` made."""
    config = ServiceConfig.model_validate(values["config"])
    return Settings(config, values["folder"], values["version"])
