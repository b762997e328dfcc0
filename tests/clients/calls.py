"""Calls of unmodified clients; runs in their environment, knows nothing of this project.

Run as `python calls.py URL` with the key in LOCKSTEP_API_KEY. Prints a line for each call that gave
what it should; ends with status 1 and the reason at the first that did not.
"""

import asyncio
import io
import json
import os
import sys
import time

import httpx
import kserve
import numpy as np
import openai
import tritonclient.http as triton
from kserve.inference_client import InferenceRESTClient, RESTConfig
from tritonclient.utils import InferenceServerException

KEY = os.environ["LOCKSTEP_API_KEY"]
HEADERS = {"Authorization": f"Bearer {KEY}"}
MODEL = "half_plus_two"
X = np.array([1.0, 2.0, 5.0], np.float32)
Y = [2.5, 3.0, 4.5]


def said(text: str) -> None:
    """Tell of what went well."""
    print(f"ok  {text}", flush=True)


def check(is_right: bool, what: str, got: object) -> None:
    """End where something is wrong."""
    if not is_right:
        sys.exit(f"WRONG  {what}: {got!r}")
    said(what)


def tritons(url: str) -> None:
    """tritonclient.http: health, metadata, repository, JSON and binary, compression, errors."""
    client = triton.InferenceServerClient(url.removeprefix("http://"))
    check(client.is_server_live(headers=HEADERS), "triton live", None)
    check(client.is_server_ready(headers=HEADERS), "triton ready", None)
    check(client.is_model_ready(MODEL, "1", headers=HEADERS), "triton model ready", None)
    server = client.get_server_metadata(headers=HEADERS)
    check(server["name"] == "lockstep", "triton server metadata", server)
    model = client.get_model_metadata(MODEL, headers=HEADERS)
    check(model["inputs"][0]["datatype"] == "FP32", "triton model metadata", model)
    config = client.get_model_config(MODEL, headers=HEADERS)
    check(config["input"][0]["name"] == "x", "triton model config", config)
    index = client.get_model_repository_index(headers=HEADERS)
    check(any(entry["name"] == MODEL for entry in index), "triton repository index", index)
    client.load_model(MODEL, headers=HEADERS)
    said("triton load")
    for is_binary in (True, False):
        tensor = triton.InferInput("x", [3], "FP32")
        tensor.set_data_from_numpy(X, binary_data=is_binary)
        for outputs in (
            None,
            [triton.InferRequestedOutput("y", binary_data=True)],
            [triton.InferRequestedOutput("y", binary_data=False)],
        ):
            for compression in (None, "gzip", "deflate"):
                result = client.infer(
                    MODEL,
                    [tensor],
                    model_version="1",
                    outputs=outputs,
                    request_id="7",
                    headers={**HEADERS},  # the client writes into it
                    request_compression_algorithm=compression,
                    response_compression_algorithm=compression,
                )
                got = result.as_numpy("y").tolist()
                form = "binary" if is_binary else "json"
                kind = "default" if outputs is None else outputs[0]._get_tensor()["parameters"]
                check(got == Y, f"triton infer {form}, outputs {kind}, {compression}", got)
                check(result.get_response()["id"] == "7", "triton request id", None)
    pending = client.async_infer(MODEL, [tensor], headers=HEADERS)
    check(pending.get_result().as_numpy("y").tolist() == Y, "triton async infer", None)
    stats = client.get_inference_statistics(MODEL, headers=HEADERS)
    check(stats["model_stats"][0]["inference_count"] > 0, "triton statistics", stats)
    for name, status, headers in ((MODEL, "401", {}), ("absent", "404", HEADERS)):
        try:
            client.infer(name, [tensor], headers=headers)
        except InferenceServerException as error:
            check(error.status() == status and bool(error.message()), f"triton {status}", error)
        else:
            sys.exit(f"WRONG  triton: no error for {name}")


async def kserves(url: str) -> None:
    """kserve.InferenceRESTClient with both protocols."""
    one = InferenceRESTClient(RESTConfig(protocol="v1", verbose=False))
    check(await one.is_server_live(url, headers=HEADERS), "kserve v1 live", None)
    check(await one.is_model_ready(url, MODEL, headers=HEADERS), "kserve v1 model ready", None)
    answer = await one.infer(url, {"instances": X.tolist()}, model_name=MODEL, headers={**HEADERS})
    check(answer["predictions"] == Y, "kserve v1 predict", answer)
    two = InferenceRESTClient(RESTConfig(protocol="v2", verbose=False))
    check(await two.is_server_live(url, headers=HEADERS), "kserve v2 live", None)
    check(await two.is_server_ready(url, headers=HEADERS), "kserve v2 ready", None)
    check(await two.is_model_ready(url, MODEL, headers=HEADERS), "kserve v2 model ready", None)
    for is_binary in (False, True):
        tensor = kserve.InferInput("x", [3], "FP32")
        tensor.set_data_from_numpy(X, binary_data=is_binary)
        parameters = {"binary_data_output": True} if is_binary else None
        request = kserve.InferRequest(
            model_name=MODEL, infer_inputs=[tensor], parameters=parameters
        )
        answer = await two.infer(url, request, model_name=MODEL, headers={**HEADERS})
        got = answer.outputs[0].as_numpy().tolist()
        check(got == Y, f"kserve v2 infer, {'binary' if is_binary else 'json'}", got)
    try:
        await two.infer(url, request, model_name="absent", headers={**HEADERS})
    except httpx.HTTPStatusError as error:
        check("no model" in str(error), "kserve v2 error text", error)
    else:
        sys.exit("WRONG  kserve: no error for an absent model")


def openais(url: str) -> None:
    """openai: a file goes up, becomes a batch, and its answers come down."""
    client = openai.OpenAI(api_key=KEY, base_url=f"{url}/openai/v1", max_retries=2)
    endpoint = f"/v1/models/{MODEL}:predict"
    lines = [
        {"custom_id": f"r{n}", "method": "POST", "url": endpoint, "body": {"instances": [{"x": x}]}}
        for n, x in enumerate(X.tolist())
    ]
    text = "\n".join(map(json.dumps, lines)).encode()
    upload = client.files.create(file=("in.jsonl", io.BytesIO(text)), purpose="batch")
    check(upload.bytes == len(text), "openai file", upload)
    check(client.files.retrieve(upload.id).id == upload.id, "openai file retrieve", None)
    check(upload.id in [file.id for file in client.files.list()], "openai file list", None)
    check(client.files.content(upload.id).content == text, "openai file content", None)
    batch = client.batches.create(
        input_file_id=upload.id, endpoint=endpoint, completion_window="24h", metadata={"a": "b"}
    )
    deadline = time.monotonic() + 120
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        if time.monotonic() > deadline:
            sys.exit(f"WRONG  openai: the batch is {batch.status} after two minutes")
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    check(batch.status == "completed", "openai batch", batch)
    check(batch.request_counts.completed == len(X), "openai request counts", batch)
    out = client.files.content(batch.output_file_id).text.splitlines()
    found = {line["custom_id"]: line["response"] for line in map(json.loads, out)}
    values = [found[f"r{n}"]["body"]["predictions"][0] for n in range(len(X))]
    check(values == Y, "openai output", values)
    check(batch.id in [b.id for b in client.batches.list()], "openai batch list", None)
    client.files.delete(upload.id)
    said("openai file delete")
    try:
        openai.OpenAI(api_key="lk_wrong", base_url=f"{url}/openai/v1").batches.list()
    except openai.AuthenticationError as error:
        check(error.status_code == 401, "openai 401", error)


def main(url: str) -> None:
    """All clients."""
    tritons(url)
    asyncio.run(kserves(url))
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    if "/openai/v1/batches" in paths:
        openais(url)
    else:
        print("--  openai: the service has no batch jobs")


if __name__ == "__main__":
    main(sys.argv[1])
