"""The service as one ASGI application: the front, and the routers by protocol.

Owns the assembly. Runs on Ray Serve (`serving.deployment`) and under any ASGI server in process.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serving.assembly import at_work
from serving.errors import NotFound, RefusedRequest, RequestError
from serving.front import Front, account_of, error_response
from serving.metrics import CONTENT_TYPE
from serving.openapi import describe
from serving.service import Services
from serving.v1_routes import v1_router
from serving.v2_routes import v2_router


def build_app(services: Services, preload: tuple[str, ...] = ()) -> FastAPI:
    """The application. Its lifespan starts and stops the parts.

    Args:
        services: The parts.
        preload: Models whose champion is loaded before the first request.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with at_work(services, preload):
            yield

    app = FastAPI(
        title="Lockstep",
        version=services.version,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(_operation_router(services))
    app.include_router(v1_router(services))
    app.include_router(v2_router(services))
    if services.batches is not None and services.batch_routers is not None:
        for router in services.batch_routers(services.batches, account_of):
            app.include_router(router)
    app.add_exception_handler(HTTPException, _explain_http)
    app.add_middleware(Front, services=services)
    describe(app)
    return app


async def _explain_http(request: Request, error: Exception) -> Response:
    """What the router raises: no such route, or not with this method."""
    status = getattr(error, "status_code", 500)
    detail = str(getattr(error, "detail", ""))
    if status == 404:
        failure: RequestError = NotFound("there is no such route; /openapi.json lists them.")
    elif status == 405:
        failure = RefusedRequest(f"{request.method} is not allowed here.", 405, "method")
    else:
        failure = RefusedRequest(detail, status)
    response = error_response(request.url.path, failure)
    response.headers.update(getattr(error, "headers", None) or {})
    return response


def _operation_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["Operation"])

    @router.get("/", response_class=Response)
    async def alive() -> Response:
        """Tell KServe's V1 clients that the process answers."""
        return _json({"status": "alive"})

    @router.get("/livez", response_class=Response)
    async def livez() -> Response:
        """Whether the process answers."""
        return _json({"live": True})

    @router.get("/readyz", response_class=Response)
    async def readyz() -> Response:
        """Whether requests should come; 503 before the registry was read and before the end."""
        is_ready = services.is_ready
        return _json({"ready": is_ready}, 200 if is_ready else 503)

    @router.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Numbers for Prometheus; for admins, as they name users and models."""
        if not services.limits.is_metrics_public and account_of(request).role != "admin":
            raise RefusedRequest("metrics are for admins.", 403, "forbidden")
        return Response(services.metrics.render(), media_type=CONTENT_TYPE)

    return router


def _json(value: object, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")
