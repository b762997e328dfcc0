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

from serving.app import build_app
from serving.assembly import Settings, build_services, log_to, plain, settings_of
from serving.haproxy import LOOPBACK

_APP = "lockstep"
_MOST_REQUESTS = 4_096
_REQUESTS_A_REPLICA = 64  # beyond, another replica starts, up to the bound


@serve.ingress()
class Online:
    """A replica: one process with its own models.

    Args:
        values: Of `serving.assembly.plain`.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._settings = settings_of(values)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, in the event loop that will run it."""
        settings = self._settings
        log_to(Path(settings.folder) / "logs")
        return build_app(build_services(settings), settings.config.preload)


def start(settings: Settings) -> None:
    """Start the service in the Ray that this process has joined; returns when it answers.

    Raises:
        RuntimeError: It does not start; the replicas' log says why.
    """
    config = settings.config
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": LOOPBACK, "port": config.port},
        logging_config={"enable_access_log": False, "log_level": "ERROR"},
    )
    most = config.max_replicas or config.replicas
    scale: dict[str, Any] = {"num_replicas": config.replicas}
    if most > config.replicas:
        scale = {
            "num_replicas": None,
            "autoscaling_config": {
                "min_replicas": config.replicas,
                "max_replicas": most,
                "target_ongoing_requests": _REQUESTS_A_REPLICA,
            },
        }
    deployment = serve.deployment(
        Online,
        name="online",
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=_MOST_REQUESTS,
        graceful_shutdown_timeout_s=config.drain_s,
        logging_config={"enable_access_log": False, "log_level": "ERROR"},
        **scale,
    )
    serve.run(deployment.bind(plain(settings)), name=_APP, route_prefix="/")


def stop() -> None:
    """End the service: replicas take no more requests, answer what they have, and end."""
    serve.delete(_APP)
    serve.shutdown()
