"""Tensors of the Open Inference Protocol (V2), as JSON and as bytes.

Owns data types, layouts and lengths. In the binary form a body is the JSON header and then the
bytes of all tensors in order, little-endian and row-major; texts (BYTES) are a length of four bytes
and UTF-8. Every length is checked against what was sent before anything is made of it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.features import Array, InputColumn
from serving.errors import InputError, RefusedRequest
from serving.signature import Signature

DATATYPES: dict[str, str] = {
    **{"BOOL": "?", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8"},
    **{f"INT{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
}
_ALL_DATATYPES = (*DATATYPES, "BF16", "BYTES")
_RAW_DATATYPES = {"string": "BYTES", "int64": "INT64", "timestamp[us]": "INT64"}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as metadata tells it: -1 in the shape is any number of rows."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """As in V2's metadata."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


def input_specs(signature: Signature) -> list[TensorSpec]:
    """The input tensors of a model: one for each column."""
    return [_input_spec(column) for column in signature.layout.features]


def output_spec(signature: Signature) -> TensorSpec:
    """The output tensor of a model."""
    return TensorSpec(signature.output_name, "FP32", (-1, *signature.output_shape))


def _input_spec(column: InputColumn) -> TensorSpec:
    if column.encoding is not None:
        return TensorSpec(column.name, _RAW_DATATYPES[column.encoding.raw_dtype], (-1,))
    return TensorSpec(column.name, "FP32", (-1, *column.shape))


@dataclass(frozen=True)
class InferRequest:
    """A request of V2, its tensors read.

    Attributes:
        id: To be echoed, or None.
        columns: Tensors by name.
        outputs: The outputs that were asked for: name and whether as bytes; None: the one there
            is.
        is_binary: Whether outputs come as bytes where none was named.
        timeout_us: How long the request may wait; any size of number, or None.
    """

    id: str | None
    columns: dict[str, Array]
    outputs: tuple[tuple[str, bool], ...] | None
    is_binary: bool
    timeout_us: float | None


def read_infer(document: dict[str, Any], tail: memoryview) -> InferRequest:
    """A request from its JSON part and the bytes after it.

    Raises:
        RefusedRequest: Something is not as V2 says, or lengths do not fit.
    """
    identity = document.get("id")
    if identity is not None and not isinstance(identity, str):
        raise RefusedRequest("id must be a string.")
    parameters = _parameters(document, "the request")
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise RefusedRequest("inputs must be a list of one tensor or more.")
    columns: dict[str, Array] = {}
    offset = 0
    for index, tensor in enumerate(inputs):
        if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
            raise RefusedRequest(f"inputs[{index}] must be an object with a name.")
        name = tensor["name"]
        if name in columns:
            raise RefusedRequest(f"there are two inputs {name!r}; one is allowed.")
        columns[name], offset = _read_tensor(name, tensor, tail, offset)
    if offset != len(tail):
        raise RefusedRequest(
            f"{len(tail)} bytes follow the JSON part; its binary_data_size add up to {offset}."
        )
    timeout = parameters.get("timeout")
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0
    ):
        raise RefusedRequest("parameters.timeout must be a number of microseconds, 0 or more.")
    return InferRequest(
        identity,
        columns,
        _outputs(document),
        parameters.get("binary_data_output") is True,
        timeout,
    )


def _outputs(document: dict[str, Any]) -> tuple[tuple[str, bool], ...] | None:
    outputs = document.get("outputs")
    if outputs is None:
        return None
    if not isinstance(outputs, list):
        raise RefusedRequest("outputs must be a list.")
    default = _parameters(document, "the request").get("binary_data_output") is True
    found: list[tuple[str, bool]] = []
    for index, output in enumerate(outputs):
        if not isinstance(output, dict) or not isinstance(output.get("name"), str):
            raise RefusedRequest(f"outputs[{index}] must be an object with a name.")
        parameters = _parameters(output, f"outputs[{index}]")
        if parameters.get("classification"):
            raise RefusedRequest("parameters.classification is not offered; ask for the numbers.")
        if output["name"] in [name for name, _ in found]:
            raise RefusedRequest(f"there are two outputs {output['name']!r}; one is allowed.")
        found.append((output["name"], parameters.get("binary_data", default) is True))
    return tuple(found) or None


def _parameters(holder: dict[str, Any], what: str) -> dict[str, Any]:
    parameters = holder.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise RefusedRequest(f"parameters of {what} must be an object.")
    return parameters


def _read_tensor(
    name: str, tensor: dict[str, Any], tail: memoryview, offset: int
) -> tuple[Array, int]:
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if datatype not in _ALL_DATATYPES:
        raise RefusedRequest(
            f"input {name!r}: received the datatype {str(datatype)[:40]!r}; "
            f"{', '.join(_ALL_DATATYPES)} are allowed."
        )
    if (
        not isinstance(shape, list)
        or not all(type(axis) is int and axis >= 0 for axis in shape)
        or not 1 <= len(shape) <= 32
    ):
        raise RefusedRequest(f"input {name!r}: shape must be a list of one or more lengths.")
    count = math.prod(shape)
    size = _parameters(tensor, f"input {name!r}").get("binary_data_size")
    if size is None:
        return _from_json(name, datatype, shape, count, tensor.get("data")), offset
    if "data" in tensor:
        raise RefusedRequest(f"input {name!r} has data and binary_data_size; one is allowed.")
    if type(size) is not int or size < 0 or offset + size > len(tail):
        raise RefusedRequest(
            f"input {name!r}: binary_data_size is {str(size)[:40]}; {len(tail) - offset} bytes "
            "are left of the body."
        )
    part = tail[offset : offset + size]
    return _shaped(name, read_bytes(name, datatype, part, count), shape), offset + size


def _shaped(name: str, values: Array, shape: Sequence[int]) -> Array:
    try:
        return values.reshape(shape)
    except (ValueError, OverflowError):  # no elements, and an axis that no array has
        raise RefusedRequest(
            f"input {name!r}: shape {str(list(shape))[:100]} is that of no array."
        ) from None


def read_bytes(name: str, datatype: str, part: memoryview, count: int) -> Array:
    """A flat tensor of `count` elements from its bytes.

    Raises:
        RefusedRequest: They are more or fewer.
    """
    if datatype == "BYTES":
        return _texts(name, part, count)
    width = 2 if datatype == "BF16" else np.dtype(DATATYPES[datatype]).itemsize
    if len(part) != count * width:
        raise RefusedRequest(
            f"input {name!r}: received {len(part)} bytes; its shape takes {count * width} of "
            f"{datatype}."
        )
    if datatype == "BF16":  # the upper half of a float32
        return (np.frombuffer(part, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(part, DATATYPES[datatype])


def _texts(name: str, part: memoryview, count: int) -> Array:
    texts: list[str] = []
    offset = 0
    while offset < len(part) and len(texts) <= count:
        end = offset + 4 + int.from_bytes(part[offset : offset + 4], "little")
        if offset + 4 > len(part) or end > len(part):
            raise RefusedRequest(f"input {name!r}: a text is longer than what is left of it.")
        try:
            texts.append(bytes(part[offset + 4 : end]).decode())
        except UnicodeDecodeError:
            raise InputError(f"row {len(texts)}, column {name!r}: not UTF-8.") from None
        offset = end
    if len(texts) != count:
        raise RefusedRequest(f"input {name!r}: its shape takes {count} texts, as many as it has.")
    return np.array(texts, object)


def _from_json(name: str, datatype: str, shape: Sequence[int], count: int, data: Any) -> Array:
    if not isinstance(data, list):
        raise RefusedRequest(f"input {name!r}: data must be a list, flat or of its shape.")
    try:
        values = np.array(data, object if datatype == "BYTES" else None)
        is_right = values.dtype.kind in ("O" if datatype == "BYTES" else "iufb")
        if not is_right or (datatype == "BYTES" and not _are_texts(values)):
            raise InputError(f"column {name!r}: its data are not all of {datatype}. Convert them.")
        if values.size != count:
            raise RefusedRequest(
                f"input {name!r}: received {values.size} elements; its shape takes {count}."
            )
        if datatype.startswith(("INT", "UINT")):
            values = _whole(name, datatype, values)
        return values.reshape(shape)
    except (ValueError, OverflowError, TypeError):
        raise RefusedRequest(
            f"input {name!r}: data must be flat or of its shape {list(shape)}."
        ) from None


def _are_texts(values: Array) -> bool:
    return all(isinstance(value, str) for value in values.ravel())


def _whole(name: str, datatype: str, values: Array) -> Array:
    bounds = np.iinfo(DATATYPES[datatype])
    if values.size and (
        values.dtype.kind not in "iu" or values.min() < bounds.min or values.max() > bounds.max
    ):
        raise InputError(f"column {name!r}: its data are not all of {datatype}. Convert them.")
    return values


def write_infer(
    head: dict[str, Any], name: str, values: Array, is_binary: bool
) -> tuple[bytes, int | None]:
    """A response with one output tensor.

    Returns:
        The body, and the length of its JSON part; None where it is JSON alone.
    """
    output: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(values.shape)}
    if not is_binary:
        output["data"] = values.ravel().tolist()
        return json.dumps({**head, "outputs": [output]}).encode(), None
    raw = np.ascontiguousarray(values, "<f4").tobytes()
    output["parameters"] = {"binary_data_size": len(raw)}
    header = json.dumps({**head, "outputs": [output]}).encode()
    return header + raw, len(header)
