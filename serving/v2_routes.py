"""The routes below /v2: the Open Inference Protocol, with binary tensors, as Triton and KServe do.

Owns its forms, and what its two clients look for beyond the protocol: JSON bodies of health checks,
`model_name` in answers, and the extensions of repository, configuration and statistics.
"""

import json
import math
import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from data_pipeline.features import Array
from serving.bodies import check_is_json, parse_object, worked_on
from serving.engine import LiveModel
from serving.errors import NotFound, RefusedRequest
from serving.front import account_of, deadline_of
from serving.service import Services, Target, find_model, find_number, predict
from serving.tensors import (
    InferRequest,
    TensorSpec,
    input_specs,
    output_spec,
    read_bytes,
    read_infer,
    write_infer,
)

HEADER_LENGTH = "inference-header-content-length"
_EXTENSIONS = ["binary_tensor_data", "model_repository", "model_configuration", "statistics"]
_TYPES = {"FP32": "TYPE_FP32", "INT64": "TYPE_INT64", "BYTES": "TYPE_STRING"}


def v2_router(services: Services) -> APIRouter:
    """All routes below /v2."""
    router = APIRouter(tags=["Open Inference Protocol V2"])
    routes = _V2(services)

    def add(path: str, handler: Any, method: str = "GET") -> None:
        router.add_api_route(path, handler, methods=[method], response_class=Response)

    add("/v2", routes.server)
    add("/v2/health/live", routes.live)
    add("/v2/health/ready", routes.ready)
    add("/v2/models", routes.models)
    add("/v2/models/stats", routes.all_statistics)
    add("/v2/repository/index", routes.index, "POST")
    add("/v2/repository/models/{name}/load", routes.load, "POST")
    add("/v2/repository/models/{name}/unload", routes.unload, "POST")
    for way in ("", "/versions/{version}"):
        path = "/v2/models/{name}" + way
        add(path, routes.model)
        add(path + "/ready", routes.model_ready)
        add(path + "/config", routes.config)
        add(path + "/stats", routes.statistics)
        add(path + "/infer", routes.infer, "POST")
    return router


class _V2:
    def __init__(self, services: Services) -> None:
        self._services = services

    async def server(self, request: Request) -> Response:
        """Name, version and extensions of the server."""
        return _json(
            {
                "name": self._services.name,
                "version": self._services.version,
                "extensions": _EXTENSIONS,
            }
        )

    async def live(self, request: Request) -> Response:
        """Whether the process answers."""
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        """Whether requests should come."""
        is_ready = self._services.is_ready
        return _json({"ready": is_ready}, 200 if is_ready else 503)

    async def models(self, request: Request) -> Response:
        """Names of the models that this user may use."""
        return _json({"models": self._names(request)})

    async def model(self, request: Request) -> Response:
        """Inputs and outputs of a model."""
        live = await self._find(request)
        versions = await self._services.engine.versions(live.version.name)
        signature = live.predictor.signature
        return _json(
            {
                "name": live.version.name,
                "versions": [str(v.number) for v in versions if v.state == "ready"],
                "platform": "keras",
                "inputs": [spec.as_json() for spec in input_specs(signature)],
                "outputs": [output_spec(signature).as_json()],
            }
        )

    async def model_ready(self, request: Request) -> Response:
        """Whether a model can answer; it is loaded for that."""
        live = await self._find(request)
        return _json({"name": live.version.name, "ready": True})

    async def config(self, request: Request) -> Response:
        """Triton's view of a model."""
        live = await self._find(request)
        signature = live.predictor.signature
        return _json(
            {
                "name": live.version.name,
                "platform": "keras",
                "backend": "lockstep",
                "version_policy": {"all": {}},
                "max_batch_size": self._services.limits.rows,
                "dynamic_batching": {"max_queue_delay_microseconds": 0},
                "input": [_configured(spec) for spec in input_specs(signature)],
                "output": [_configured(output_spec(signature))],
            }
        )

    async def statistics(self, request: Request) -> Response:
        """Rows and calls of a model since the process began."""
        live = await self._find(request)
        return _json({"model_stats": [self._statistics(*live.labels)]})

    async def all_statistics(self, request: Request) -> Response:
        """Rows and calls of all models that were called since the process began."""
        mine = set(self._names(request))
        called = sorted(self._services.metrics.batch_seconds.values)
        return _json(
            {
                "model_stats": [
                    self._statistics(name, version) for name, version in called if name in mine
                ]
            }
        )

    async def index(self, request: Request) -> Response:
        """All models, with the version that requests without one get."""
        entries = []
        for name in self._names(request):
            entry = {"name": name, "state": "UNAVAILABLE", "reason": "no champion"}
            try:
                number = self._services.engine.number_of(name)
            except NotFound:
                entries.append(entry)
                continue
            entries.append({"name": name, "version": str(number), "state": "READY", "reason": ""})
        return _json(entries)

    async def load(self, request: Request) -> Response:
        """Bring a model into memory; the first request would do it too."""
        live = await self._find(request)
        return _json({"name": live.version.name, "load": True})

    async def unload(self, request: Request) -> Response:
        """Take a model out of memory, as an admin; the next request brings it back."""
        account = account_of(request)
        target = _target(request)
        number = find_number(self._services, account, target)
        if account.role != "admin":
            raise RefusedRequest("admins alone may unload models.", 403, "forbidden")
        await self._services.engine.unload(target.name, number)
        return _json({"name": target.name, "unload": True})

    async def infer(self, request: Request) -> Response:
        """Predictions for tensors, in JSON or bytes."""
        services, account = self._services, account_of(request)
        deadline = deadline_of(request, services)
        live = await find_model(services, account, _target(request), deadline)
        body = await request.body()
        length = request.headers.get(HEADER_LENGTH)
        if length is None:
            check_is_json(request)
        wanted, rows = await worked_on(lambda: _read(live, body, length), len(body))
        name, is_binary = _output(wanted, output_spec(live.predictor.signature))
        if wanted.timeout_us:  # bounded first: a whole number in JSON may exceed every float
            bounded_us = min(wanted.timeout_us, services.limits.most_timeout_s * 1e6)
            deadline = min(deadline, time.monotonic() + bounded_us / 1e6)
        out = await predict(services, account, live, rows, deadline)
        head = {"model_name": live.version.name, "model_version": str(live.version.number)}
        if wanted.id is not None:
            head["id"] = wanted.id
        content, json_bytes = await worked_on(
            lambda: write_infer(head, name, out, is_binary), out.nbytes
        )
        if json_bytes is None:
            return Response(content, media_type="application/json")
        headers = {HEADER_LENGTH: str(json_bytes)}
        return Response(content, 200, headers, "application/octet-stream")

    async def _find(self, request: Request) -> LiveModel:
        deadline = deadline_of(request, self._services)
        account = account_of(request)
        return await find_model(self._services, account, _target(request), deadline)

    def _names(self, request: Request) -> list[str]:
        account = account_of(request)
        may_use = self._services.accounts.may_use
        return [name for name in self._services.engine.names() if may_use(account, name)]

    def _statistics(self, name: str, version: str) -> dict[str, Any]:
        metrics = self._services.metrics
        seconds = metrics.batch_seconds.values.get((name, version), [0.0])
        waited = metrics.waited.values.get((name, version), [0.0])
        requests = metrics.batch_requests.values.get((name, version), [0.0])
        calls = int(sum(seconds[:-1]))
        spent = {"count": calls, "ns": int(seconds[-1] * 1e9)}
        nothing = {"count": 0, "ns": 0}
        return {
            "name": name,
            "version": version,
            "inference_count": int(metrics.rows.values.get((name, version), 0)),
            "execution_count": calls,
            "inference_stats": {
                "success": {"count": int(requests[-1]), "ns": spent["ns"]},
                "fail": nothing,
                "queue": {"count": calls, "ns": int(waited[-1] * 1e9)},
                "compute_input": nothing,
                "compute_infer": spent,
                "compute_output": nothing,
            },
        }


def _target(request: Request) -> Target:
    return Target(request.path_params["name"], request.path_params.get("version"))


def _read(live: LiveModel, body: bytes, header_length: str | None) -> tuple[InferRequest, Array]:
    """The request and its rows, from a body of JSON, or of JSON and bytes."""
    if header_length is None:
        wanted = read_infer(parse_object(body), memoryview(b""))
    elif header_length == "0":
        wanted = _raw(live, body)
    else:
        length = int(header_length) if header_length.isascii() and header_length.isdigit() else -1
        if not 0 < length <= len(body) or len(header_length) > 12:
            raise RefusedRequest(
                f"{HEADER_LENGTH} is {header_length[:40]!r}; the length of the JSON part of the "
                f"body of {len(body)} bytes is needed."
            )
        wanted = read_infer(parse_object(body[:length]), memoryview(body)[length:])
    known = {spec.name for spec in input_specs(live.predictor.signature)}
    unknown = sorted(set(wanted.columns) - known)
    if unknown:
        raise RefusedRequest(
            f"there is no input {unknown[0][:60]!r}; {', '.join(sorted(known))} are allowed."
        )
    return wanted, live.predictor.rows(wanted.columns)


def _raw(live: LiveModel, body: bytes) -> InferRequest:
    """A body that is the bytes of the only input, and no JSON."""
    specs = input_specs(live.predictor.signature)
    if len(specs) != 1 or specs[0].datatype == "BYTES":
        raise RefusedRequest(
            f"a body of bytes alone is allowed for a model of one input of numbers; this one has "
            f"{len(specs)}. Send the JSON part too."
        )
    (spec,) = specs
    shape = spec.shape[1:]
    elements = math.prod(shape)
    rows = len(body) // (elements * (8 if spec.datatype == "INT64" else 4))
    values = read_bytes(spec.name, spec.datatype, memoryview(body), rows * elements)
    return InferRequest(None, {spec.name: values.reshape(rows, *shape)}, None, True, None)


def _output(wanted: InferRequest, spec: TensorSpec) -> tuple[str, bool]:
    if wanted.outputs is None:
        return spec.name, wanted.is_binary
    for name, _ in wanted.outputs:
        if name != spec.name:
            raise RefusedRequest(f"there is no output {name[:60]!r}; {spec.name!r} is allowed.")
    return wanted.outputs[0]


def _configured(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": _TYPES[spec.datatype],
        "dims": list(spec.shape[1:]) or [1],
    }


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")
