"""The prediction service beside plain Ray Serve: requests a second, waits, rows a second.

Run as `python -m benchmarks.serving`. Each reading starts a server anew; the load comes from a
process of its own (`benchmarks.serving_load`). The batch half is `benchmarks.serving_batch`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.harness import (
    LookOut,
    Peer,
    Reading,
    Report,
    Row,
    Target,
    arguments,
    conditions,
    measure,
    ratio,
    ratio_of_medians,
)
from benchmarks.serving_batch import ABOUT as BATCH_ABOUT
from benchmarks.serving_batch import batch_rows
from serving.bodies import ARROW_STREAM
from serving.haproxy import FrontProxy, free_ports, proxy_environment

_PACKAGES = ("lockstep", "tensorflow", "keras", "ray", "fastapi", "numpy", "pyarrow")
_NAMES = [f"x{number}" for number in range(9)]
_SECONDS = 6.0
_START_S = 180.0
_MANY_ROWS = 1_000
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
_ABOUT = (
    "The network is Dense 32, 128, 1 on 9 numbers. Online, JSON: one row a request, an object of "
    "named numbers; each client keeps its connection and asks again when it has its answer. The "
    "plain peers are Ray Serve deployments with a FastAPI ingress and one replica, as its "
    "documentation has them: one calls `model.predict`, one a compiled function. The empty route "
    "is such a deployment too, behind the same front as Lockstep (HAProxy, throughput settings), "
    "and answers without looking at the request. Lockstep checks a key, a quota and each value, "
    "and writes a line of log.",
    "Rows a second: requests of 1,000 rows by 8 clients, whole answers of 1,000 predictions.",
)
_NOT_MEASURED = (
    "More than one machine, GPUs, TLS.",
    "Server and load share the two cores; both take part of them.",
)


def write_model(folder: Path) -> Path:
    """The artifact of the network with random weights."""
    import keras

    from tests.support.artifacts import write_artifact

    keras.utils.set_random_seed(7)
    layers = [keras.layers.Dense(units, activation="relu") for units in (32, 128)]
    model = keras.Sequential([keras.Input((9,)), *layers, keras.layers.Dense(1)])
    model.save(folder / "model.keras")
    signature = {
        "inputs": [{"name": name, "dtype": "float32", "shape": [None]} for name in _NAMES],
        "outputs": [{"name": "prediction", "dtype": "float32", "shape": [None, 1]}],
        "label": {"name": "y", "dtype": "float32", "shape": [None, 1]},
        "weight": None,
    }
    files = {
        "model.keras": (folder / "model.keras").read_bytes(),
        "signature.json": json.dumps(signature).encode(),
    }
    return write_artifact(folder / "artifact", files)


def requests(folder: Path, key: str) -> dict[str, Path]:
    """The requests, as they go over the wire, by name."""
    values = np.random.default_rng(0).normal(size=(_MANY_ROWS, 9)).astype(np.float32)
    rows = [dict(zip(_NAMES, map(float, row), strict=True)) for row in values]
    path = "/v1/models/m:predict"
    size = {"binary_data_size": 4 * _MANY_ROWS}
    tensors = [
        {"name": name, "datatype": "FP32", "shape": [_MANY_ROWS], "parameters": size}
        for name in _NAMES
    ]
    head = json.dumps({"parameters": {"binary_data_output": True}, "inputs": tensors}).encode()
    sink = pa.BufferOutputStream()
    table = pa.table(dict(zip(_NAMES, values.T, strict=True)))
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    bodies = {
        "one": (path, {}, json.dumps({"instances": rows[:1]}).encode()),
        "json": (path, {}, json.dumps({"instances": rows}).encode()),
        "arrow": (path, {"content-type": ARROW_STREAM}, bytes(sink.getvalue())),
        "binary": (
            "/v2/models/m/infer",
            {"inference-header-content-length": str(len(head))},
            head + values.T.copy().tobytes(),
        ),
    }
    files = {}
    for name, (where, headers, body) in bodies.items():
        lines = [
            f"POST {where} HTTP/1.1",
            "host: 127.0.0.1",
            f"authorization: Bearer {key}",
            f"content-length: {len(body)}",
            *(f"{header}: {value}" for header, value in headers.items()),
        ]
        files[name] = folder / f"{name}.request"
        files[name].write_bytes("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    return files


class Trials:
    """Starts servers and loads them.

    Args:
        folder: For the model, the service's home, and what is sent.
        seconds: Of each measurement.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder = folder
        self._seconds = seconds
        self._kept: dict[str, Reading] = {}
        self._home = folder / "home"
        artifact = write_model(folder)
        os.environ["LOCKSTEP_HOME"] = str(self._home)
        from registry.database import Database
        from registry.store import Registry
        from serving.accounts import Accounts

        database = Database()
        registry = Registry(database)
        version = registry.register("m", artifact)
        registry.set_alias("m", "champion", version.number, who="benchmark", why="benchmark")
        key = Accounts(database).add("benchmark", who="benchmark")
        database.close()
        self._files = requests(folder, key)

    def peers(self) -> list[Peer]:
        """All that is measured; those of one server stand together, its first one starts it."""
        found = []
        for kind, name in (
            ("predict", "Ray Serve, model.predict"),
            ("compiled", "Ray Serve, compiled function"),
            ("empty", "empty route, same front"),
            ("lockstep", "Lockstep"),
        ):
            loads = [(f"{name}, 64 clients", "requests/s", "one", 64)]
            loads.append((f"{name}, 1 client, p50", "ms", "one", 1))
            if kind == "lockstep":
                loads += [
                    (f"Lockstep, {form}, {_MANY_ROWS} rows a request", "rows/s", form, 8)
                    for form in ("json", "arrow", "binary")
                ]
            for index, (peer, unit, _, _) in enumerate(loads):
                found.append(Peer(peer, unit, self._reader(kind, loads, index)))
        return found

    def _reader(self, kind: str, loads: list[tuple[str, str, str, int]], index: int) -> Any:
        def read() -> Reading:
            name = loads[index][0]
            if name not in self._kept:
                with self._server(kind) as port:
                    for peer, unit, form, clients in loads:
                        self._kept[peer] = self._load(port, unit, form, clients)
            return self._kept.pop(name)

        return read

    def _load(self, port: int, unit: str, form: str, clients: int) -> Reading:
        begin = time.time()
        command = ["benchmarks.serving_load", str(port), str(clients), str(self._seconds)]
        done = subprocess.run(
            [sys.executable, "-m", *command, str(self._files[form])],
            capture_output=True,
            text=True,
            check=True,
            timeout=self._seconds + 60,
        )
        said = json.loads(done.stdout.splitlines()[-1])
        assert not said["wrong"], done.stderr
        value = said["p50_ms"]
        if unit != "ms":
            rows = _MANY_ROWS if unit == "rows/s" else 1
            value = said["requests"] * rows / said["seconds"]
        return Reading(value, begin, time.time())

    @contextmanager
    def _server(self, kind: str) -> Iterator[int]:
        (port,) = free_ports(1)
        environment = {**os.environ, **_ENVIRONMENT}
        command = [sys.executable, "-m", "lockstep.cli", "serve", "--port", str(port)]
        command += ["--predictors", "0"]
        if kind != "lockstep":
            model = str(self._folder / "model.keras")
            command = [sys.executable, "-m", "benchmarks.serving_peers", kind, str(port), model]
        with ExitStack() as stack:
            if kind == "empty":
                front = FrontProxy("127.0.0.1", port)
                environment |= stack.enter_context(proxy_environment(front))
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            server = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            try:
                self._wait(server, log)
                yield port
            finally:
                if kind == "lockstep":
                    server.send_signal(signal.SIGTERM)
                assert server.stdin is not None
                server.stdin.close()
                try:
                    server.wait(90)
                except subprocess.TimeoutExpired:
                    server.kill()

    def _wait(self, server: "subprocess.Popen[bytes]", log: Any) -> None:
        deadline = time.monotonic() + _START_S
        said = ""
        while time.monotonic() < deadline and server.poll() is None:
            log.seek(0)
            said = log.read()
            if "\nready\n" in f"\n{said}" or "a key: " in said:
                time.sleep(2)  # until the front knows its replica
                return
            time.sleep(0.2)
        raise RuntimeError(f"a server did not start:\n{said[-3000:]}")


def ratios_and_targets(rows: Mapping[str, Row]) -> tuple[list[Row], list[Target]]:
    """What the online half has to reach."""
    many, one = ", 64 clients", ", 1 client, p50"
    bars = (
        ("requests/s to model.predict", f"Lockstep{many}", f"Ray Serve, model.predict{many}", 40.0),
        (
            "requests/s to a compiled function",
            f"Lockstep{many}",
            f"Ray Serve, compiled function{many}",
            4.0,
        ),
        ("requests/s to an empty route", f"Lockstep{many}", f"empty route, same front{many}", 0.6),
        ("p50 to an empty route", f"Lockstep{one}", f"empty route, same front{one}", 2.0),
    )
    ratios = [ratio(name, rows, above, below) for name, above, below, _ in bars]
    targets = [
        Target(name, ratio_of_medians(rows, above, below), bar, is_limit=name.startswith("p50"))
        for name, above, below, bar in bars
    ]
    return ratios, targets


def main() -> int:
    """Measure, print, write; returns the exit status."""
    parser = arguments("The prediction service beside plain Ray Serve and Ray Data.")
    parser.add_argument("--part", choices=("all", "online", "batch"), default="all")
    options = parser.parse_args()
    parts = ("online", "batch") if options.part == "all" else (options.part,)
    repeats = 1 if options.quick else options.repeats
    measured = {"online": online_report, "batch": batch_report}
    return max([measured[part](options.quick, repeats).conclude() for part in parts])


def online_report(is_quick: bool, repeats: int) -> Report:
    """Requests of clients, answered at once."""
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as folder:
        trials = Trials(Path(folder), 1.0 if is_quick else _SECONDS)
        with _look_out(is_quick) as look_out:
            rows = measure(trials.peers(), repeats, look_out, 0 if is_quick else 1)
    ratios, targets = ratios_and_targets(rows)
    return Report(
        topic="serving",
        is_quick=is_quick,
        rows=[*rows.values(), *ratios],
        targets=targets,
        about=_ABOUT,
        not_measured=_NOT_MEASURED,
        conditions=conditions(_PACKAGES),
        program="serving --part online",
    )


def batch_report(is_quick: bool, repeats: int) -> Report:
    """Jobs, from Parquet to Parquet."""
    with _look_out(is_quick) as look_out:
        rows, ratios, targets = batch_rows(is_quick, repeats, look_out)
    return Report(
        topic="serving-batch",
        is_quick=is_quick,
        rows=[*rows.values(), *ratios],
        targets=targets,
        about=BATCH_ABOUT,
        not_measured=("More than one machine, GPUs; inputs and outputs in object stores.",),
        conditions=conditions(_PACKAGES),
        program="serving --part batch",
    )


def _look_out(is_quick: bool) -> LookOut:
    return LookOut(0.0 if is_quick else 120.0)


if __name__ == "__main__":
    sys.exit(main())
