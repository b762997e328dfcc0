"""The description of the service for programs: OpenAPI, with every status and both forms of bodies.

Owns what FastAPI cannot know: routes here take raw requests, so that nothing stands between a body
and the model. Bodies, answers, path parameters and security are described in tables below.
"""

import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serving.bodies import TABLES

_METHODS = ("get", "put", "post", "delete", "patch")
_OPEN = ("/", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
_STATUSES = {
    "400": "The request is not as it must be; the text tells what and where.",
    "401": "No API key, or one that is unknown, expired or revoked.",
    "403": "For admins.",
    "404": "No such model, version or route, or no grant for it.",
    "405": "Another method is needed.",
    "408": "The body did not come in time.",
    "409": "It is in use, or being made by another request.",
    "413": "The body, what it inflates to, or the number of rows is too large.",
    "415": "A type or encoding of the body that is not taken here.",
    "422": "The same key as of another request, or a field that is not allowed.",
    "429": "A quota, the queue or the memory for bodies is full; Retry-After tells when to return.",
    "500": "The model or the service failed.",
    "503": "The service or the model is not ready; Retry-After tells when to come back.",
    "504": "No answer before the deadline (header lockstep-timeout-s).",
}
_SECONDS = {"type": "integer", "minimum": 1}
_ANY: dict[str, Any] = {"$ref": "#/components/schemas/Value"}
_SCHEMAS: dict[str, Any] = {
    "Value": {"description": "A number, text, boolean, null, or lists and objects of them."},
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string"}, "code": {"type": "string"}},
    },
    "OpenAIError": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
    "PredictRequest": {
        "type": "object",
        "oneOf": [{"required": ["instances"]}, {"required": ["inputs"]}],
        "properties": {
            "signature_name": {"type": "string", "enum": ["serving_default", ""]},
            "instances": {"type": "array", "minItems": 1, "items": _ANY},
            "inputs": _ANY,
        },
        "example": {"instances": [{"distance": 1400, "hour": 9}]},
    },
    "PredictResponse": {
        "type": "object",
        "oneOf": [{"required": ["predictions"]}, {"required": ["outputs"]}],
        "properties": {"predictions": {"type": "array"}, "outputs": {"type": "array"}},
    },
    "InferTensor": {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": {"type": "string"},
            "datatype": {"type": "string"},
            "shape": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
            "parameters": {"type": "object"},
            "data": {"type": "array"},
        },
    },
    "InferRequest": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {"type": "object"},
            "inputs": {
                "type": "array",
                "minItems": 1,
                "items": {"$ref": "#/components/schemas/InferTensor"},
            },
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
                },
            },
        },
    },
    "InferResponse": {
        "type": "object",
        "required": ["model_name", "outputs"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "outputs": {
                "type": "array",
                "items": {"$ref": "#/components/schemas/InferTensor"},
            },
        },
    },
}
_TABLE_BODIES: dict[str, Any] = {
    kind: {"schema": {"type": "string", "format": "binary"}} for kind in TABLES
}
_BYTES: dict[str, Any] = {
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
}


def describe(app: FastAPI) -> None:
    """Make the application answer /openapi.json with the whole description."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(
        title=app.title,
        version=app.version,
        summary="Predictions of Keras models, online and in batch jobs.",
        routes=app.routes,
    )
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {}).update(_SCHEMAS)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"key": []}]
    for path, operations in schema["paths"].items():
        for method in _METHODS:
            if method in operations:
                _complete(path, operations[method])
    return schema


def _complete(path: str, operation: dict[str, Any]) -> None:
    """Add what is the same for all routes, and what the tables say of this one."""
    if path in _OPEN:
        operation["security"] = []
    known = {p["name"] for p in operation.setdefault("parameters", []) if p["in"] == "path"}
    for name in re.findall(r"\{(\w+)\}", path):
        if name not in known:
            kind = {"type": "string", "minLength": 1}
            operation["parameters"].append(
                {"name": name, "in": "path", "required": True, "schema": kind}
            )
    responses = operation.setdefault("responses", {})
    error = "OpenAIError" if path.startswith("/openai/") else "Error"
    for status, text in _STATUSES.items():
        if status in responses and status != "422":
            continue
        responses[status] = {
            "description": text,
            "content": {"application/json": {"schema": _reference(error)}},
        }
        if status in ("429", "503"):
            responses[status]["headers"] = {"Retry-After": {"schema": _SECONDS}}
    own = ("/v1/models", "/v2", "/livez", "/readyz", "/metrics")
    if (
        not path.startswith(own) and path != "/"
    ):  # files and batch jobs: files of any type come back
        for status in ("200", "201"):
            responses[status] = {"description": "The answer.", "content": {"*/*": {"schema": _ANY}}}
        return
    media = "text/plain" if path == "/metrics" else "application/json"
    answer: dict[str, Any] = {media: {"schema": _ANY}}
    if path.endswith(":predict"):
        operation["requestBody"] = _body("PredictRequest", _TABLE_BODIES)
        answer = {media: {"schema": _reference("PredictResponse")}, **_TABLE_BODIES}
    elif path.endswith("/infer"):
        operation["requestBody"] = _body("InferRequest", {})
        answer = {media: {"schema": _reference("InferResponse")}, **_BYTES}
    responses["200"] = {"description": "The answer.", "content": answer}
    if path in ("/readyz", "/v2/health/ready"):
        responses["503"] = {"description": "Not ready.", "content": {media: {"schema": _ANY}}}


def _body(schema: str, others: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(schema)}, **others}
    return {"required": True, "content": content}


def _reference(schema: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{schema}"}
