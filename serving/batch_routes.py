"""Routes of batch jobs: our own below /v1/files and /v1/batches, and what both APIs share.

    POST   /v1/files?filename=x.parquet     the bytes as the body, or a form with `file`
    GET    /v1/files    /v1/files/{file}    /v1/files/{file}/content        DELETE /v1/files/{file}
    POST   /v1/batches                      with Idempotency-Key: the same job for the same request
    GET    /v1/batches    /v1/batches/{batch}
    POST   /v1/batches/{batch}/cancel
    GET    /v1/batches/{batch}/output       the manifest; /output/parts/part-00000.parquet a part
    DELETE /v1/batches/{batch}/output

Handlers block on the database and on files, so they run in threads; only uploads are read on the
loop, into a temporary file.
"""

from collections.abc import Callable

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.account_types import Account
from serving.batch_upload import listed, page_of, streamed
from serving.batch_wire import BatchRequest, describe_job
from serving.batches import BatchService
from serving.bodies import parse_object
from serving.file_routes import FileRoutes
from serving.openai_routes import openai_router

Authenticate = Callable[[Request], Account]

_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_LIST_PARAMETERS = [
    {"name": "after", "in": "query", "schema": {"type": "string"}},
    {
        "name": "limit",
        "in": "query",
        "schema": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
    },
]


def batch_routers(service: BatchService, authenticate: Authenticate) -> list[APIRouter]:
    """All routes of batch jobs: our own, and those for OpenAI's clients.

    Args:
        service: Files and jobs.
        authenticate: Tells whose request it is, or raises.
    """
    return [batches_router(service, authenticate), openai_router(service, authenticate)]


def batches_router(service: BatchService, authenticate: Authenticate) -> APIRouter:
    """The routes below /v1/files and /v1/batches."""
    router = APIRouter(tags=["Batch jobs"])
    routes = _Routes(service, authenticate)
    upload = {
        "parameters": [{"name": "filename", "in": "query", "schema": {"type": "string"}}],
        "requestBody": {"required": True, "content": _BYTES},
    }
    submit = {
        "parameters": [{"name": "Idempotency-Key", "in": "header", "schema": {"type": "string"}}],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": BatchRequest.model_json_schema()}},
        },
    }
    listing = {"parameters": _LIST_PARAMETERS}
    for method, path, handler, extra in (
        ("POST", "/v1/files", routes.upload, upload),
        ("GET", "/v1/files", routes.files, listing),
        ("GET", "/v1/files/{file}", routes.file, None),
        ("GET", "/v1/files/{file}/content", routes.content, None),
        ("DELETE", "/v1/files/{file}", routes.delete, None),
        ("POST", "/v1/batches", routes.submit, submit),
        ("GET", "/v1/batches", routes.jobs, listing),
        ("GET", "/v1/batches/{batch}", routes.job, None),
        ("POST", "/v1/batches/{batch}/cancel", routes.cancel, None),
        ("GET", "/v1/batches/{batch}/output", routes.output, None),
        ("DELETE", "/v1/batches/{batch}/output", routes.delete_output, None),
        ("GET", "/v1/batches/{batch}/output/{part:path}", routes.part, None),
    ):
        router.add_api_route(
            path, handler, methods=[method], response_class=Response, openapi_extra=extra
        )
    return router


class _Routes(FileRoutes):
    async def submit(self, request: Request) -> Response:
        """Take a job in; 201 for a new one, 200 where the idempotency key has one already."""
        values = parse_object(await request.body())
        key = request.headers.get("idempotency-key")
        account = self.account_of(request)
        job, is_new = await run_in_threadpool(self.service.submit, account, values, key)
        return JSONResponse(describe_job(job), 201 if is_new else 200)

    def jobs(self, request: Request) -> Response:
        """Own jobs, newest first; an admin gets everybody's with everybody=true."""
        after, limit = page_of(request)
        everybody = request.query_params.get("everybody") == "true"
        found, has_more = self.service.jobs(self.account_of(request), after, limit, everybody)
        return listed([describe_job(job) for job in found], has_more)

    def job(self, request: Request, batch: str) -> Response:
        """State, progress, place in the queue and time to the end."""
        return JSONResponse(describe_job(self.service.job(self.account_of(request), batch)))

    def cancel(self, request: Request, batch: str) -> Response:
        """Cancel a job; what was committed stays, marked as incomplete."""
        return JSONResponse(describe_job(self.service.cancel(self.account_of(request), batch)))

    def output(self, request: Request, batch: str) -> Response:
        """The manifest: every part with its rows and SHA-256."""
        return JSONResponse(self.service.output(self.account_of(request), batch))

    def delete_output(self, request: Request, batch: str) -> Response:
        """Remove the output of an ended job."""
        job = self.service.delete_output(self.account_of(request), batch)
        return JSONResponse(describe_job(job))

    def part(self, request: Request, batch: str, part: str) -> Response:
        """The bytes of a file that the manifest names."""
        return streamed(self.service.part(self.account_of(request), batch, part))
