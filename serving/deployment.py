"""The service on Ray Serve: the only file that knows it.

Owns how the application becomes processes: replicas between two bounds, HAProxy before them
(`serving.haproxy`, whose environment must be set before this module is imported), and an end in
which requests under way are answered.
"""

import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve._private import replica

from cluster.runtime import node_address
from configs.load import load_service
from serving.app import build_app
from serving.assembly import (
    Settings,
    build_services,
    log_to,
    plain,
    settings_for,
    settings_of,
)
from serving.dispatching import Dispatching
from serving.haproxy import LOOPBACK

_APP = "lockstep"
_LOGGING = {"enable_access_log": False, "log_level": "ERROR"}
_MOST_REQUESTS = 4_096
_REQUESTS_A_REPLICA = 64  # beyond, another replica starts, up to the bound


@serve.ingress()
class Online:
    """A replica: one process with its own models.

    Args:
        values: Of `serving.assembly.plain`.
        beside: What is deployed together with it.
    """

    def __init__(self, values: dict[str, Any], beside: Any = None) -> None:
        _stay_on_loopback()
        self._settings = settings_of(values)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, in the event loop that will run it."""
        settings = self._settings
        log_to(Path(settings.folder) / "logs")
        return build_app(build_services(settings), settings.config.preload)


class Dispatcher:
    """The process that dispatches batch jobs; Ray Serve starts it again if it dies.

    Args:
        values: Of `serving.assembly.plain`.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        _stay_on_loopback()
        settings = settings_of(values)
        log_to(Path(settings.folder) / "logs")
        self._dispatching = Dispatching(settings)
        self._dispatching.start()

    def check_health(self) -> None:
        """Raise where the loop has ended: Ray Serve starts another process then."""
        if not self._dispatching.is_alive:
            raise RuntimeError("the dispatching of batch jobs has ended; its log tells why.")

    def __del__(self) -> None:
        """End with the shards under way."""
        self._dispatching.stop()


def _stay_on_loopback() -> None:
    """Where Ray keeps to loopback, so does the server that each replica has for other replicas.

    Ray Serve binds it to every address, once the replica's own class is made, and it believes what
    it is sent.
    """
    if node_address() != LOOPBACK:
        return  # other nodes have to reach it
    bind = replica.add_port_to_grpc_server

    def bind_here(server: Any, address: str) -> int:
        port: int = bind(server, address.replace("[::]", LOOPBACK))
        return port

    replica.add_port_to_grpc_server = bind_here


def application(settings: Settings) -> serve.Application:
    """The replicas for online requests, and the dispatching of batch jobs beside them."""
    config, values = settings.config, plain(settings)
    most = config.max_replicas or config.replicas
    scale: dict[str, Any] = {"num_replicas": config.replicas}
    if most > config.replicas:
        bounds = {"min_replicas": config.replicas, "max_replicas": most}
        target = {"target_ongoing_requests": _REQUESTS_A_REPLICA}
        scale = {"num_replicas": "auto", "autoscaling_config": bounds | target}
    online = serve.deployment(
        Online,
        name="online",
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=_MOST_REQUESTS,
        graceful_shutdown_timeout_s=config.drain_s,
        logging_config=_LOGGING,
        **scale,
    )
    if config.predictors == 0:
        return online.bind(values)
    dispatcher = serve.deployment(
        Dispatcher,
        name="dispatcher",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=config.drain_s,
        logging_config=_LOGGING,
    )
    return online.bind(values, dispatcher.bind(values))


def build(arguments: dict[str, str]) -> serve.Application:
    """The application for `serve deploy` and KubeRay, which start Ray and the front themselves.

    Args:
        arguments: `config`: path of a YAML file with fields of `configs.service`.

    Raises:
        UserError: The file cannot be used.
    """
    return application(settings_for(load_service(arguments.get("config"), {})))


def start(settings: Settings) -> None:
    """Start the service in the Ray that this process has joined; returns when it answers.

    Raises:
        RuntimeError: It does not start; the replicas' log says why.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": LOOPBACK, "port": settings.config.port},
        logging_config=_LOGGING,
    )
    serve.run(application(settings), name=_APP, route_prefix="/")


def stop() -> None:
    """End the service: replicas take no more requests, answer what they have, and end."""
    serve.delete(_APP)
    serve.shutdown()
