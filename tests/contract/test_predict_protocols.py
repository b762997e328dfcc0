"""The forms of each protocol, over HTTP in process: what clients send and what they look for."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.bodies import ARROW_FILE, ARROW_STREAM, PARQUET
from tests.support.service import Service, running_service

ROW = {"a": 1.5, "b": 2}
PREDICTED = 21.5


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a coroutine function with one service for all tests of this file."""
    folder: Path = tmp_path_factory.mktemp("service")
    with asyncio.Runner() as runner:
        context = running_service(folder)
        service = runner.run(context.__aenter__())

        async def begin() -> None:
            for name, layout in (("m", "plain"), ("window", "window"), ("raw", "raw")):
                service.promote(name, service.register(name, layout))
                await service.moved(name, 1)

        runner.run(begin())
        yield lambda scenario: runner.run(scenario(service))
        runner.run(context.__aexit__(None, None, None))


Call = Callable[[Callable[[Service], Coroutine[Any, Any, Any]]], Any]


def ask(call: Call, method: str, path: str, **options: Any) -> Any:
    async def scenario(service: Service) -> Any:
        return await service.client.request(method, path, **options)

    return call(scenario)


def predict(call: Call, body: Any, path: str = "/v1/models/m:predict") -> Any:
    return ask(call, "POST", path, json=body)


# -- TensorFlow Serving ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["", "/versions/1", "/labels/champion"])
def test_rows_and_columns_by_each_way_to_a_version(call: Call, way: str) -> None:
    path = f"/v1/models/m{way}:predict"
    rows = predict(call, {"instances": [ROW, {"a": 0, "b": True, "extra": "x"}]}, path)
    assert (rows.status_code, rows.json()) == (200, {"predictions": [[PREDICTED], [10.0]]})
    columns = predict(
        call, {"signature_name": "serving_default", "inputs": {"a": [1.5], "b": [2]}}, path
    )
    assert columns.json() == {"outputs": [[PREDICTED]]}
    assert columns.headers["content-type"] == "application/json"  # exactly: KServe's client looks


def test_rows_by_position(call: Call) -> None:
    assert predict(call, {"instances": [[1.5, 2], [0, 1]]}).json() == {
        "predictions": [[PREDICTED], [10.0]]
    }


def test_lists_as_values(call: Call) -> None:
    path = "/v1/models/window:predict"
    window = [[1, 0, 0], [0, 0, 2]]
    for body in ({"instances": [{"window": window}]}, {"instances": [window]}):
        assert predict(call, body, path).json() == {"predictions": [[200001.0]]}
    for body in ({"inputs": {"window": [window]}}, {"inputs": [window]}):
        assert predict(call, body, path).json() == {"outputs": [[200001.0]]}


def test_texts_and_moments(call: Call) -> None:
    path = "/v1/models/raw:predict"
    noon = 12 * 3_600 * 1_000_000
    carriers = ["UA", {"b64": "VUE="}, None, "never seen"]
    rows = [{"a": 1, "carrier": carrier, "time": noon} for carrier in carriers]
    out = predict(call, {"instances": rows}, path).json()["predictions"]
    assert out[0] == out[1]
    assert out[2] == out[3] == [pytest.approx(out[0][0] - 20, abs=1e-3)]
    iso = predict(call, {"instances": [{**rows[0], "time": "1970-01-01T12:00:00"}]}, path)
    assert iso.json()["predictions"] == [pytest.approx(out[0], abs=1e-3)]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_the_type_of_a_json_body_is_not_asked_for(call: Call, kind: str | None) -> None:
    headers = {"content-type": kind} if kind else {}
    body = json.dumps({"instances": [ROW]}).encode()
    response = ask(call, "POST", "/v1/models/m:predict", content=body, headers=headers)
    assert response.json() == {"predictions": [[PREDICTED]]}


def test_status_has_what_both_kinds_of_clients_read(call: Call) -> None:
    expected = {
        "name": "m",
        "ready": True,
        "model_version_status": [
            {
                "version": "1",
                "state": "AVAILABLE",
                "status": {"error_code": "OK", "error_message": ""},
            }
        ],
    }
    for way in ("", "/versions/1", "/labels/champion"):
        assert ask(call, "GET", f"/v1/models/m{way}").json() == expected
    assert set(ask(call, "GET", "/v1/models").json()["models"]) == {"m", "window", "raw"}
    assert ask(call, "GET", "/").json() == {"status": "alive"}


def test_metadata_names_raw_columns(call: Call) -> None:
    body = ask(call, "GET", "/v1/models/raw/metadata").json()
    assert body["model_spec"] == {"name": "raw", "signature_name": "", "version": "1"}
    signature = body["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert {name: info["dtype"] for name, info in signature["inputs"].items()} == {
        "a": "DT_FLOAT",
        "carrier": "DT_STRING",
        "time": "DT_INT64",
    }
    assert signature["outputs"]["prediction"]["tensor_shape"]["dim"][1]["size"] == "1"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "neither of instances and inputs"),
        ({"instances": [ROW], "inputs": ROW}, "both of instances and inputs"),
        ({"instances": []}, "one row or more"),
        ({"instances": {}}, "one row or more"),
        ({"instances": [ROW], "signature_name": "other"}, "'serving_default' is allowed"),
        ({"instances": [ROW, {"a": 1}]}, "row 1: no column 'b'"),
        ({"instances": [{"a": 1, "bb": 2}]}, "Did you mean 'bb'"),
        ({"instances": [ROW, 5]}, "row 1: received 5; an object"),
        ({"instances": [[1, 2], [1, 2, 3]]}, "row 1: received a list of 3"),
        ({"instances": [{"a": "1", "b": 2}]}, "row 0, column 'a': received '1'; a number"),
        ({"instances": [ROW, {"a": None, "b": 2}]}, "row 1, column 'a': received null"),
        ({"instances": [{"a": [1, 2], "b": 2}]}, "column 'a' has shape [1, 2]"),
        ({"instances": [ROW, {"a": float("nan"), "b": 1}]}, "row 1, column 'a': received nan"),
        ({"instances": [{"a": 1, "b": float("-inf")}]}, "column 'b': received -inf"),
        ({"instances": [{"a": 1e300, "b": 1}]}, "row 0, column 'a': received inf"),
        ({"instances": [{"a": 10**400, "b": 1}]}, "row 0, column 'a': received 1000"),
        ({"inputs": {"a": [1, 2], "b": [1]}}, "column 'b' has 1 values, 'a' has 2"),
        ({"inputs": {"a": 1, "b": 2}}, "a list with one value for each row"),
        ({"inputs": {"a": [], "b": []}}, "no rows"),
        ({"inputs": [1]}, "an object with a list for each of a, b"),
        ({"inputs": {"a": [[1]], "b": [[[1]]]}}, "column 'b'"),
        ([ROW], "received an array as the body"),
        (None, "received null as the body"),
    ],
)
def test_what_is_wrong_with_a_request_is_told(call: Call, body: Any, said: str) -> None:
    content = json.dumps(body).encode()
    response = ask(call, "POST", "/v1/models/m:predict", content=content)
    assert response.status_code == 400
    assert said in response.json()["error"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"a": 1, "carrier": 5, "time": 0}, "row 0, column 'carrier': received 5; string"),
        ({"a": 1, "carrier": {"b64": "*"}, "time": 0}, "b64"),
        ({"a": 1, "carrier": {"b64": "/w=="}, "time": 0}, "UTF-8"),
        ({"a": 1, "carrier": "x", "time": 1.5}, "row 0, column 'time': received 1.5"),
        ({"a": 1, "carrier": "x", "time": "noon"}, "column 'time'"),
        ({"a": 1, "carrier": "\ud800", "time": 0}, "column 'carrier'"),
    ],
)
def test_wrong_texts_and_moments_are_told(call: Call, row: Any, said: str) -> None:
    content = json.dumps({"instances": [row]}).encode()
    response = ask(call, "POST", "/v1/models/raw:predict", content=content)
    assert response.status_code == 400
    assert said in response.json()["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"instances": [' + b"[" * 100_000])
def test_what_is_no_json_is_told(call: Call, body: bytes) -> None:
    response = ask(call, "POST", "/v1/models/m:predict", content=body)
    assert response.status_code == 400
    assert "not JSON that can be read" in response.json()["error"]


def test_classify_and_regress_are_refused_as_by_a_model_without_them(call: Call) -> None:
    for verb in ("classify", "regress"):
        response = predict(call, {"examples": []}, f"/v1/models/m:{verb}")
        assert response.status_code == 400
        assert ":predict" in response.json()["error"]


# -- tables ---------------------------------------------------------------------------------------


def table_body(table: pa.Table, kind: str, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    if kind == PARQUET:
        pq.write_table(table, sink, **options)
    else:
        new = pa.ipc.new_stream if kind == ARROW_STREAM else pa.ipc.new_file
        with new(sink, table.schema, **options) as writer:
            writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


def read_table(body: bytes, kind: str) -> pa.Table:
    source = pa.py_buffer(body)
    if kind == PARQUET:
        return pq.read_table(pa.BufferReader(source))
    reader = pa.ipc.open_stream if kind == ARROW_STREAM else pa.ipc.open_file
    return reader(source).read_all()


@pytest.mark.parametrize("kind", [ARROW_STREAM, ARROW_FILE, PARQUET])
def test_tables_come_and_go_in_one_form(call: Call, kind: str) -> None:
    table = pa.table({"b": pa.array([2, 3, 4]), "x": ["p", "q", "r"], "a": [1.5, 2.5, 3.5]})
    headers = {"content-type": kind}
    response = ask(
        call, "POST", "/v1/models/m:predict", content=table_body(table, kind), headers=headers
    )
    assert response.status_code == 200
    assert response.headers["content-type"] == kind
    assert read_table(response.content, kind).to_pydict() == {"prediction": [21.5, 32.5, 43.5]}
    headers["accept"] = "application/json"
    response = ask(
        call, "POST", "/v1/models/m:predict", content=table_body(table, kind), headers=headers
    )
    assert response.json() == {"predictions": [[21.5], [32.5], [43.5]]}


@pytest.mark.parametrize("kind", [ARROW_STREAM, PARQUET])
def test_tables_of_texts_moments_and_lists(call: Call, kind: str) -> None:
    table = pa.table(
        {
            "a": pa.array([1, 1], pa.int8()),
            "carrier": pa.array(["UA", None]),
            "time": pa.array([0, 0], pa.timestamp("ms")),
        }
    )
    headers = {"content-type": kind}
    response = ask(
        call, "POST", "/v1/models/raw:predict", content=table_body(table, kind), headers=headers
    )
    first, second = read_table(response.content, kind)["prediction"].to_pylist()
    assert first - second == 20
    window = pa.table({"window": pa.array([[1.0, 0, 0, 0, 0, 2]], pa.list_(pa.float64()))})
    response = ask(
        call, "POST", "/v1/models/window:predict", content=table_body(window, kind), headers=headers
    )
    assert read_table(response.content, kind)["prediction"].to_pylist() == [200001.0]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"a": [1.0]}, "no column 'b'"),
        ({"a": [1.0, None], "b": [1.0, 2.0]}, "row 1, column 'a': null or NaN"),
        ({"a": [1.0, float("inf")], "b": [1.0, 2.0]}, "row 1, column 'a': received inf"),
        ({"a": ["1"], "b": [1.0]}, "column 'a' is of string"),
        ({"a": [[1.0, 2.0]], "b": [1.0]}, "lists of other than 1 elements"),
    ],
)
@pytest.mark.parametrize("kind", [ARROW_STREAM, PARQUET])
def test_wrong_tables_are_told(call: Call, columns: Any, said: str, kind: str) -> None:
    body = table_body(pa.table(columns), kind)
    response = ask(
        call, "POST", "/v1/models/m:predict", content=body, headers={"content-type": kind}
    )
    assert response.status_code == 400
    assert said in response.json()["error"]


DAMAGED = {
    "m": pa.table({"a": [1.0] * 50, "b": [1.0] * 50}),
    "window": pa.table({"window": pa.array([[1.0, 0, 0, 0, 0, 2]] * 20, pa.list_(pa.float64()))}),
    "raw": pa.table(
        {
            "a": pa.array([1] * 20, pa.int8()),
            "carrier": pa.array(["UA", None, "AA", "\u00e9"] * 5).dictionary_encode(),
            "time": pa.array(["1970-01-01T12:00:00"] * 20),
        }
    ),
}


@pytest.mark.parametrize("model", list(DAMAGED))
@pytest.mark.parametrize("kind", [ARROW_STREAM, ARROW_FILE, PARQUET])
def test_damaged_tables_are_told(call: Call, kind: str, model: str) -> None:
    sink = pa.BufferOutputStream()
    if kind == PARQUET:
        pq.write_table(DAMAGED[model], sink)
    else:
        new = pa.ipc.new_stream if kind == ARROW_STREAM else pa.ipc.new_file
        with new(sink, DAMAGED[model].schema) as writer:
            writer.write_table(DAMAGED[model])
    whole = bytes(sink.getvalue())
    generator = np.random.default_rng(0)
    bodies = [b"", b"PAR1", whole[: len(whole) // 2], b"x" * 100]
    for _ in range(150):
        changed = bytearray(whole)
        for place in generator.integers(0, len(whole), int(generator.integers(1, 9))):
            changed[place] = int(generator.integers(256))
        bodies.append(bytes(changed))
    for body in bodies:
        response = ask(
            call,
            "POST",
            f"/v1/models/{model}:predict",
            content=body,
            headers={"content-type": kind},
        )
        assert response.status_code in (200, 400, 413), response.text


def texts(offsets: list[int], data: bytes) -> pa.Array:
    ends = pa.array(offsets, pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(len(offsets) - 1, ends, pa.py_buffer(data))


@pytest.mark.parametrize("kind", [ARROW_STREAM, ARROW_FILE])
@pytest.mark.parametrize(
    "carrier",
    [
        pa.DictionaryArray.from_arrays(pa.array([0, 9], pa.int32()), ["UA"], safe=False),
        pa.DictionaryArray.from_arrays(pa.array([-7, 0], pa.int8()), ["UA"], safe=False),
        texts([0, 9, 2], b"UAAA"),
        texts([0, 2, 4], b"UA\xff\xfe"),
    ],
)
def test_indices_and_offsets_that_lead_nowhere_are_told(
    call: Call, kind: str, carrier: pa.Array
) -> None:
    table = pa.table({"a": [1, 1], "carrier": carrier, "time": pa.array([0, 0], pa.int64())})
    sink = pa.BufferOutputStream()
    new = pa.ipc.new_stream if kind == ARROW_STREAM else pa.ipc.new_file
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    response = ask(
        call,
        "POST",
        "/v1/models/raw:predict",
        content=bytes(sink.getvalue()),
        headers={"content-type": kind},
    )
    assert response.status_code == 400
    assert "can be read" in response.json()["error"]


@pytest.mark.parametrize("kind", [ARROW_STREAM, ARROW_FILE, PARQUET])
def test_columns_that_come_twice_or_hold_the_wrong_kind(call: Call, kind: str) -> None:
    numbers = pa.array([1.0, 2.0])
    tables = {
        "several columns 'a'": pa.Table.from_arrays([numbers] * 3, ["a", "a", "b"]),
        "'a' is of struct": pa.table({"a": [{"x": 1.0}] * 2, "b": numbers}),
        "'a' is of list<": pa.table({"a": [[[1.0]]] * 2, "b": numbers}),
        "no column 'a'": pa.table({"c": numbers}),
    }
    for said, table in tables.items():
        response = ask(
            call,
            "POST",
            "/v1/models/m:predict",
            content=table_body(table, kind),
            headers={"content-type": kind},
        )
        assert response.status_code == 400, said
        assert said in response.json()["error"]


def test_arrow_with_compressed_buffers_is_refused(call: Call) -> None:
    table = pa.table({"a": [1.0] * 1000, "b": [1.0] * 1000})
    for kind in (ARROW_STREAM, ARROW_FILE):
        body = table_body(table, kind, options=pa.ipc.IpcWriteOptions(compression="zstd"))
        response = ask(
            call, "POST", "/v1/models/m:predict", content=body, headers={"content-type": kind}
        )
        assert response.status_code == 400
        assert "compressed" in response.json()["error"]


# -- Open Inference Protocol ----------------------------------------------------------------------


def tensor(name: str, data: Any, datatype: str = "FP32", shape: Any = None) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape or [len(data)], "data": data}


A_AND_B = [tensor("a", [1.5, 2.5]), tensor("b", [2, 3], "INT64")]
INFER = "/v2/models/m/infer"


def test_tensors_in_json(call: Call) -> None:
    response = ask(call, "POST", INFER, json={"id": "42", "inputs": A_AND_B})
    assert response.json() == {
        "model_name": "m",
        "model_version": "1",
        "id": "42",
        "outputs": [
            {"name": "prediction", "datatype": "FP32", "shape": [2, 1], "data": [21.5, 32.5]}
        ],
    }
    response = ask(call, "POST", "/v2/models/m/versions/1/infer", json={"inputs": A_AND_B})
    assert "id" not in response.json()
    nested = [tensor("a", [[1.5]], shape=[1, 1]), tensor("b", [2.0], "FP64", [1])]
    body = {"inputs": nested, "outputs": [{"name": "prediction"}]}
    assert ask(call, "POST", INFER, json=body).json()["outputs"][0]["data"] == [21.5]


def binary(header: dict[str, Any], tail: bytes) -> tuple[bytes, dict[str, str]]:
    text = json.dumps(header).encode()
    return text + tail, {"inference-header-content-length": str(len(text))}


def test_tensors_in_bytes(call: Call) -> None:
    a, b = np.array([1.5, 2.5], "<f4").tobytes(), np.array([2, 3], "<u2").tobytes()
    header = {
        "parameters": {"binary_data_output": True},
        "inputs": [
            {"name": "a", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}},
            {
                "name": "b",
                "datatype": "UINT16",
                "shape": [2],
                "parameters": {"binary_data_size": 4},
            },
        ],
    }
    body, headers = binary(header, a + b)
    response = ask(call, "POST", INFER, content=body, headers=headers)
    assert response.status_code == 200
    length = int(response.headers["inference-header-content-length"])
    answer = json.loads(response.content[:length])
    assert answer["outputs"] == [
        {
            "name": "prediction",
            "datatype": "FP32",
            "shape": [2, 1],
            "parameters": {"binary_data_size": 8},
        }
    ]
    assert np.frombuffer(response.content[length:], "<f4").tolist() == [21.5, 32.5]
    header["outputs"] = [{"name": "prediction", "parameters": {"binary_data": False}}]
    body, headers = binary(header, a + b)
    headers["content-encoding"] = "gzip"
    response = ask(call, "POST", INFER, content=gzip.compress(body), headers=headers)
    assert response.json()["outputs"][0]["data"] == [21.5, 32.5]


def test_texts_and_halves_in_bytes(call: Call) -> None:
    texts = b"".join(len(t).to_bytes(4, "little") + t for t in (b"UA", b"?"))
    half = (np.array([1.5, 2.5], np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    sizes = {"a": (half, "BF16"), "carrier": (texts, "BYTES"), "time": (bytes(16), "INT64")}
    inputs = [
        {"name": n, "datatype": d, "shape": [2], "parameters": {"binary_data_size": len(raw)}}
        for n, (raw, d) in sizes.items()
    ]
    body, headers = binary({"inputs": inputs}, b"".join(raw for raw, _ in sizes.values()))
    response = ask(call, "POST", "/v2/models/raw/infer", content=body, headers=headers)
    first, second = response.json()["outputs"][0]["data"]
    assert first - second == 20 - 1


def test_a_body_of_bytes_alone(call: Call) -> None:
    raw = np.array([1, 0, 0, 0, 0, 2] * 2, "<f4").tobytes()
    headers = {"inference-header-content-length": "0"}
    response = ask(call, "POST", "/v2/models/window/infer", content=raw, headers=headers)
    length = int(response.headers["inference-header-content-length"])
    assert np.frombuffer(response.content[length:], "<f4").tolist() == [200001.0] * 2
    assert ask(call, "POST", INFER, content=raw, headers=headers).status_code == 400
    odd = ask(call, "POST", "/v2/models/window/infer", content=raw[:-1], headers=headers)
    assert odd.status_code == 400


def parameters(**values: Any) -> dict[str, Any]:
    return {"name": "a", "datatype": "FP32", "shape": [2], "parameters": values}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"inputs": []},
        {"inputs": {}},
        {"inputs": [5]},
        {"inputs": A_AND_B, "id": 5},
        {"inputs": A_AND_B, "parameters": []},
        {"inputs": A_AND_B, "parameters": {"timeout": "x"}},
        {"inputs": A_AND_B, "outputs": [{"name": "other"}]},
        {"inputs": A_AND_B, "outputs": [{"name": "prediction"}] * 2},
        {"inputs": A_AND_B, "outputs": "prediction"},
        {"inputs": [*A_AND_B, A_AND_B[0]]},
        {"inputs": [*A_AND_B, tensor("c", [1.0, 2.0])]},
        {"inputs": [A_AND_B[0]]},
        {"inputs": [A_AND_B[0], tensor("b", [1.0])]},
        {"inputs": [tensor("a", [1.0], shape=[-1]), A_AND_B[1]]},
        {"inputs": [tensor("a", [1.0], shape=[2]), A_AND_B[1]]},
        {"inputs": [tensor("a", [1.0], shape=[2**62, 2**62]), A_AND_B[1]]},
        {"inputs": [tensor("a", [[1.0], [2.0, 3.0]], shape=[2]), A_AND_B[1]]},
        {"inputs": [tensor("a", ["x", "y"]), A_AND_B[1]]},
        {"inputs": [tensor("a", ["x", "y"], "BYTES"), A_AND_B[1]]},
        {"inputs": [tensor("a", [None, 1.0]), A_AND_B[1]]},
        {"inputs": [tensor("a", [300, 1], "UINT8"), A_AND_B[1]]},
        {"inputs": [tensor("a", [1.5, 1], "INT8"), A_AND_B[1]]},
        {"inputs": [tensor("a", [1, 1], "COMPLEX"), A_AND_B[1]]},
        {"inputs": [{**A_AND_B[0], "parameters": {"binary_data_size": 8}}, A_AND_B[1]]},
        {"inputs": [parameters(binary_data_size=-1), A_AND_B[1]]},
        {"inputs": [parameters(binary_data_size=10**12), A_AND_B[1]]},
        {"inputs": [parameters(), A_AND_B[1]]},
        {"inputs": [{**parameters(binary_data_size=0), "shape": [0, 2**70]}, A_AND_B[1]]},
        {"inputs": [{**parameters(binary_data_size=0), "shape": [2**70, 0]}, A_AND_B[1]]},
        {"inputs": [tensor("a", [], shape=[0, 2**70]), A_AND_B[1]]},
        {"inputs": A_AND_B, "parameters": {"timeout": -1}},
        {"inputs": A_AND_B, "parameters": {"timeout": float("nan")}},
    ],
)
def test_wrong_tensors_are_refused(call: Call, body: Any) -> None:
    response = ask(call, "POST", INFER, content=json.dumps(body))
    assert response.status_code == 400
    assert isinstance(response.json()["error"], str)


@pytest.mark.parametrize("timeout", [10**400, 1e300, float("inf")])
def test_a_timeout_beyond_all_bounds_is_the_services_own(call: Call, timeout: float) -> None:
    body = json.dumps({"inputs": A_AND_B, "parameters": {"timeout": timeout}})
    assert ask(call, "POST", INFER, content=body).status_code == 200


@pytest.mark.parametrize("length", ["-1", "x", "99999", "1" * 50, "2"])
def test_wrong_header_lengths_are_refused(call: Call, length: str) -> None:
    headers = {"inference-header-content-length": length}
    body = json.dumps({"inputs": A_AND_B}).encode()
    assert ask(call, "POST", INFER, content=body, headers=headers).status_code == 400


@pytest.mark.parametrize("texts", [b"\xff\xff\xff\xff", b"\x02\x00\x00\x00a", b"\x00", b""])
def test_wrong_lengths_of_texts_are_refused(call: Call, texts: bytes) -> None:
    inputs = [
        tensor("a", [1.0]),
        {
            "name": "carrier",
            "datatype": "BYTES",
            "shape": [1],
            "parameters": {"binary_data_size": len(texts)},
        },
        tensor("time", [0], "INT64"),
    ]
    body, headers = binary({"inputs": inputs}, texts)
    response = ask(call, "POST", "/v2/models/raw/infer", content=body, headers=headers)
    assert response.status_code == 400


def test_what_tritons_and_kserves_clients_look_for(call: Call) -> None:
    assert ask(call, "GET", "/v2/health/live").json() == {"live": True}
    assert ask(call, "GET", "/v2/health/ready").json() == {"ready": True}
    assert ask(call, "GET", "/v2").json()["name"] == "lockstep"
    assert "m" in ask(call, "GET", "/v2/models").json()["models"]
    assert ask(call, "GET", "/v2/models/m/ready").status_code == 200
    assert ask(call, "GET", "/v2/models/m").json() == {
        "name": "m",
        "versions": ["1"],
        "platform": "keras",
        "inputs": [
            {"name": "a", "datatype": "FP32", "shape": [-1]},
            {"name": "b", "datatype": "FP32", "shape": [-1]},
        ],
        "outputs": [{"name": "prediction", "datatype": "FP32", "shape": [-1, 1]}],
    }
    assert ask(call, "GET", "/v2/models/window/config").json()["input"] == [
        {"name": "window", "data_type": "TYPE_FP32", "dims": [2, 3]}
    ]
    index = ask(call, "POST", "/v2/repository/index", content=b"").json()
    assert {"name": "m", "version": "1", "state": "READY", "reason": ""} in index
    stats = ask(call, "GET", "/v2/models/m/stats").json()["model_stats"][0]
    assert stats["execution_count"] > 0
    assert ask(call, "POST", "/v2/repository/models/m/load", content=b"").status_code == 200
    assert ask(call, "POST", "/v2/repository/models/m/unload", content=b"").status_code == 403


# -- encodings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        ("gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", lambda b: zlib.compress(b, wbits=-15)),
        ("identity", bytes),
    ],
)
def test_compressed_bodies(call: Call, encoding: str, compress: Callable[[bytes], bytes]) -> None:
    body = compress(json.dumps({"instances": [ROW]}).encode())
    headers = {"content-encoding": encoding}
    response = ask(call, "POST", "/v1/models/m:predict", content=body, headers=headers)
    assert response.json() == {"predictions": [[PREDICTED]]}


def test_unknown_and_damaged_encodings(call: Call) -> None:
    for encoding, status in (("br", 415), ("gzip", 400), ("gzip, gzip", 415)):
        headers = {"content-encoding": encoding}
        response = ask(call, "POST", "/v1/models/m:predict", content=b"{}", headers=headers)
        assert response.status_code == status
    headers = {"content-encoding": "gzip"}
    cut = gzip.compress(json.dumps({"instances": [ROW]}).encode())[:-9]
    assert (
        ask(call, "POST", "/v1/models/m:predict", content=cut, headers=headers).status_code == 400
    )
    for kind in ("application/xml", "multipart/form-data", "image/png"):
        response = ask(
            call, "POST", "/v1/models/m:predict", content=b"{}", headers={"content-type": kind}
        )
        assert response.status_code == 415
