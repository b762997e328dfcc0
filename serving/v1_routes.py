"""The routes below /v1/models: TensorFlow Serving's REST, and what KServe's V1 adds to it.

Owns the forms of these two protocols. Where both have an answer on one path, it is the union, so
that the clients of both find what they look for. Bodies may also be tables (Arrow, Parquet); then
so are the answers, unless Accept asks for JSON.
"""

import json
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from data_pipeline.features import Array
from serving.bodies import (
    TABLES,
    check_is_json,
    media_type,
    parse_object,
    worked_on,
)
from serving.engine import LiveModel
from serving.errors import RefusedRequest
from serving.front import account_of, deadline_of
from serving.service import Services, Target, find_model, find_number, predict
from serving.table_bodies import rows_of_table, table_of
from serving.tensors import TensorSpec, input_specs, output_spec

_SIGNATURE = "serving_default"
_DTYPES = {"FP32": "DT_FLOAT", "INT64": "DT_INT64", "BYTES": "DT_STRING"}
_VERBS = ("predict", "classify", "regress")
_WAYS = ("", "/versions/{version}", "/labels/{label}")


def v1_router(services: Services) -> APIRouter:
    """All routes below /v1/models."""
    router = APIRouter(tags=["TensorFlow Serving and KServe V1"])
    routes = _V1(services)
    router.add_api_route("/v1/models", routes.models, methods=["GET"], response_class=Response)
    for way in _WAYS:
        path = "/v1/models/{name}" + way
        for suffix, handler, method in (
            (":predict", routes.predict, "POST"),
            (":classify", routes.not_offered, "POST"),
            (":regress", routes.not_offered, "POST"),
            ("/metadata", routes.metadata, "GET"),
            ("", routes.status, "GET"),
        ):
            router.add_api_route(
                path + suffix,
                handler,
                methods=[method],
                response_class=Response,
                name=f"{handler.__name__}{way.partition('{')[0].replace('/', '_')}{suffix}",
            )
    return router


def target_of(request: Request) -> Target:
    """The version that a path names."""
    parameters = request.path_params
    return Target(parameters["name"], parameters.get("version"), parameters.get("label"))


class _V1:
    def __init__(self, services: Services) -> None:
        self._services = services

    async def models(self, request: Request) -> Response:
        """Names of the models that this user may use."""
        account = account_of(request)
        names = self._services.engine.names()
        may_use = self._services.accounts.may_use
        return _json({"models": [name for name in names if may_use(account, name)]})

    async def predict(self, request: Request) -> Response:
        """Predictions for rows: `instances`, `inputs`, or a table as the body."""
        services, account = self._services, account_of(request)
        deadline = deadline_of(request, services)
        live = await find_model(services, account, target_of(request), deadline)
        body = await request.body()
        kind = media_type(request)
        if kind in TABLES:
            limits = services.limits
            rows = await worked_on(
                lambda: rows_of_table(
                    live.predictor, body, kind, limits.rows, limits.inflated_bytes
                ),
                len(body),
            )
            out = await predict(services, account, live, rows, deadline)
            return await worked_on(lambda: _table(request, live, out, kind), out.nbytes)
        check_is_json(request)
        rows, key = await worked_on(lambda: rows_of_json(live, body), len(body))
        out = await predict(services, account, live, rows, deadline)
        return await worked_on(lambda: _json({key: out.tolist()}), out.nbytes)

    async def status(self, request: Request) -> Response:
        """Whether a model, or one version of it, can answer."""
        services, target = self._services, target_of(request)
        account = account_of(request)
        verb = request.url.path.rpartition(":")[2]
        if verb in _VERBS:
            raise RefusedRequest(f":{verb} takes POST.", 405, "method", {"allow": "POST"})
        one = target.version is not None or target.alias is not None
        number = find_number(services, account, target) if one else None
        if number is None and not services.accounts.may_use(account, target.name):
            find_number(services, account, target)  # refuses
        versions = await services.engine.versions(target.name)
        chosen = [v for v in versions if v.number == number or (number is None)]
        if not chosen:
            await services.engine.model(target.name, number or 0)  # refuses
        shown = [v for v in chosen if one or v.state == "ready"]
        return _json(
            {
                "name": target.name,
                "ready": any(version.state == "ready" for version in shown),
                "model_version_status": [
                    {
                        "version": str(version.number),
                        "state": "AVAILABLE" if version.state == "ready" else "END",
                        "status": {"error_code": "OK", "error_message": ""},
                    }
                    for version in reversed(shown)
                ],
            }
        )

    async def metadata(self, request: Request) -> Response:
        """Inputs and outputs of a version, as TensorFlow Serving tells them."""
        services, account = self._services, account_of(request)
        deadline = deadline_of(request, services)
        live = await find_model(services, account, target_of(request), deadline)
        signature = live.predictor.signature
        definition = {
            "inputs": {spec.name: _tensor_info(spec) for spec in input_specs(signature)},
            "outputs": {signature.output_name: _tensor_info(output_spec(signature))},
            "method_name": "tensorflow/serving/predict",
        }
        spec = {
            "name": live.version.name,
            "signature_name": "",
            "version": str(live.version.number),
        }
        signatures = {"signature_def": {_SIGNATURE: definition}}
        return _json({"model_spec": spec, "metadata": {"signature_def": signatures}})

    async def not_offered(self, request: Request) -> Response:
        """Refuse classify and regress: models here have a signature for predict alone."""
        find_number(self._services, account_of(request), target_of(request))
        raise RefusedRequest(
            "the model has no signature for classify or regress; predict is allowed. Use :predict."
        )


def rows_of_json(live: LiveModel, body: bytes) -> tuple[Array, str]:
    """Rows of a JSON body, and the key that the answer has in the same form.

    Raises:
        RefusedRequest: It is not such a body.
        InputError: A row is not what it should be.
    """
    document = parse_object(body)
    name = document.get("signature_name", _SIGNATURE)
    if name not in (_SIGNATURE, ""):
        raise RefusedRequest(
            f"received signature_name {str(name)[:60]!r}; {_SIGNATURE!r} is allowed. Leave it out."
        )
    has_rows, has_columns = "instances" in document, "inputs" in document
    if has_rows == has_columns:
        raise RefusedRequest(
            f"received {'both' if has_rows else 'neither'} of instances and inputs; one of them is "
            "needed: instances for rows, inputs for columns."
        )
    if has_rows:
        return live.parser.instances(document["instances"]), "predictions"
    return live.parser.inputs(document["inputs"]), "outputs"


def _table(request: Request, live: LiveModel, out: Array, kind: str) -> Response:
    if "application/json" in request.headers.get("accept", ""):
        return _json({"predictions": out.tolist()})
    return Response(table_of(out, live.predictor.signature.output_name, kind), media_type=kind)


def _tensor_info(spec: TensorSpec) -> dict[str, Any]:
    return {
        "dtype": _DTYPES[spec.datatype],
        "tensor_shape": {
            "dim": [{"size": str(axis), "name": ""} for axis in spec.shape],
            "unknown_rank": False,
        },
        "name": f"{_SIGNATURE}_{spec.name}:0",
    }


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")
