"""OpenAI's files, batches and models, for its unmodified clients, below /openai/v1.

    client = openai.OpenAI(base_url="http://host:port/openai/v1", api_key="lk_...")

A batch's `endpoint` is a model's predict route, `/v1/models/NAME:predict` or one of a version or
label; each line of the file is a request with one row for it:

    {"custom_id": "7", "method": "POST", "url": "/v1/models/flights:predict",
     "body": {"instances": [{"dep_delay": 3, "distance": 1400}]}}

That client repeats a request that it got no answer to, without any key: so the same request within
two minutes gives the same batch.
"""

import re
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.account_types import Account
from serving.batch_tables import Job
from serving.batch_upload import listed, page_of
from serving.batch_wire import describe_job, read_request
from serving.batches import BatchService
from serving.bodies import parse_object
from serving.errors import BatchError
from serving.file_routes import FileRoutes

_ENDPOINT = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d{1,9})|/labels/([^/:]+))?:predict")
_WINDOW_S = 86_400
_OURS = (
    *("model", "input", "output", "progress", "has_good_rows", "position", "eta_s", "shards"),
    *("output_bytes", "compute_s", "output_format", "priority"),
)


def openai_router(service: BatchService, authenticate: Callable[[Request], Account]) -> APIRouter:
    """The routes below /openai/v1."""
    router = APIRouter(prefix="/openai/v1", tags=["OpenAI"])
    routes = _Routes(service, authenticate)
    for method, path, handler in (
        ("POST", "/files", routes.upload),
        ("GET", "/files", routes.files),
        ("GET", "/files/{file}", routes.file),
        ("GET", "/files/{file}/content", routes.content),
        ("DELETE", "/files/{file}", routes.delete),
        ("POST", "/batches", routes.create),
        ("GET", "/batches", routes.batches),
        ("GET", "/batches/{batch}", routes.batch),
        ("POST", "/batches/{batch}/cancel", routes.cancel),
        ("GET", "/models", routes.models),
        ("GET", "/models/{model}", routes.model),
    ):
        router.add_api_route(
            path,
            handler,
            methods=[method],
            response_class=Response,
            name=f"openai_{handler.__name__}",
            openapi_extra=_BODIES.get((method, path)),
        )
    return router


_BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/files"): {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file", "purpose"],
                        "properties": {
                            "file": {"type": "string", "format": "binary"},
                            "purpose": {"type": "string", "enum": ["batch"]},
                        },
                    }
                }
            },
        }
    },
    ("POST", "/batches"): {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["input_file_id", "endpoint", "completion_window"],
                        "properties": {
                            "input_file_id": {"type": "string"},
                            "endpoint": {"type": "string"},
                            "completion_window": {"type": "string", "enum": ["24h"]},
                            "metadata": {"type": ["object", "null"]},
                            "output_expires_after": {"type": ["object", "null"]},
                        },
                    }
                }
            },
        }
    },
}


class _Routes(FileRoutes):
    most_files = 10_000

    async def create(self, request: Request) -> Response:
        """Begin a batch."""
        values = parse_object(await request.body())
        key = request.headers.get("idempotency-key")
        job = await run_in_threadpool(self._create, self.account_of(request), values, key)
        return JSONResponse(as_openai(job))

    def batches(self, request: Request) -> Response:
        """Own batches."""
        after, limit = page_of(request)
        found, has_more = self.service.jobs(self.account_of(request), after, limit)
        return listed([as_openai(job) for job in found], has_more)

    def batch(self, request: Request, batch: str) -> Response:
        """One batch."""
        return JSONResponse(as_openai(self.service.job(self.account_of(request), batch)))

    def cancel(self, request: Request, batch: str) -> Response:
        """Cancel a batch."""
        return JSONResponse(as_openai(self.service.cancel(self.account_of(request), batch)))

    def models(self, request: Request) -> Response:
        """Models that the user may predict with."""
        names = self.service.model_names(self.account_of(request))
        return JSONResponse({"object": "list", "data": [_model(name) for name in names]})

    def model(self, request: Request, model: str) -> Response:
        """One model."""
        if model not in self.service.model_names(self.account_of(request)):
            raise BatchError(f"there is no model {model[:100]!r}.", "not_found", status=404)
        return JSONResponse(_model(model))

    def _create(self, account: Account, values: dict[str, Any], key: str | None) -> Job:
        endpoint, file = values.get("endpoint"), values.get("input_file_id")
        found = _ENDPOINT.fullmatch(endpoint) if isinstance(endpoint, str) else None
        if found is None or endpoint is None:
            raise BatchError(
                f"endpoint received {str(endpoint)[:100]!r}; /v1/models/NAME:predict is allowed.",
                "invalid_endpoint",
                status=400,
                column="endpoint",
            )
        if not isinstance(file, str) or not file.startswith("file-"):
            raise BatchError(
                "input_file_id must name an uploaded file.",
                "invalid_request",
                status=400,
                column="input_file_id",
            )
        if values.get("completion_window", "24h") != "24h":
            raise BatchError(
                "completion_window must be 24h.",
                "invalid_request",
                status=400,
                column="completion_window",
            )
        name, number, label = found.groups()
        reference = f"{name}/{number}" if number else f"{name}@{label}" if label else name
        expires = values.get("output_expires_after") or {}
        request = read_request(
            {
                "model": reference,
                "input": file,
                "output_format": "input",
                "window_s": _WINDOW_S,
                "metadata": values.get("metadata") or {},
                "output_expires_after_s": expires.get("seconds")
                if isinstance(expires, dict)
                else None,
            }
        )
        more = {"format": "openai", "model": name, "url": endpoint}
        return self.service.take(account, request, more, key, dedupe=True)[0]


def as_openai(job: Job) -> dict[str, Any]:
    """A job as OpenAI's batch object, and nothing else."""
    found = {name: value for name, value in describe_job(job).items() if name not in _OURS}
    return {**found, "model": job.model}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "lockstep"}
