"""As much of MLflow's REST interface as a run's record needs, on loopback, in memory."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

API = "/api/2.0/mlflow/"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts/"


class MlflowServer(ThreadingHTTPServer):
    """Runs, by id, as they were told.

    `status` other than 200 is answered to everything; `delay_s` comes before each answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.authorizations: list[str] = []
        self.status = 200
        self.delay_s = 0.0
        self.lock = threading.Lock()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def values(self, run: str, key: str) -> list[tuple[int, float]]:
        """What was logged of a metric, by step."""
        return [(m["step"], m["value"]) for m in self.runs[run]["metrics"] if m["key"] == key]

    def answer(self, name: str, told: dict[str, Any]) -> dict[str, Any] | None:
        handler = getattr(self, "on_" + name.replace("/", "_").replace("-", "_"), None)
        with self.lock:
            return None if handler is None else handler(told)

    def on_experiments_get_by_name(self, told: dict[str, Any]) -> dict[str, Any] | None:
        found = self.experiments.get(told["experiment_name"])
        return None if found is None else {"experiment": {"experiment_id": found}}

    def on_experiments_create(self, told: dict[str, Any]) -> dict[str, Any]:
        number = self.experiments.setdefault(told["name"], str(len(self.experiments) + 1))
        return {"experiment_id": number}

    def on_runs_create(self, told: dict[str, Any]) -> dict[str, Any]:
        run_id = f"{len(self.runs) + 1:032x}"
        experiment = told["experiment_id"]
        self.runs[run_id] = {
            "experiment": experiment,
            "status": "RUNNING",
            "tags": {tag["key"]: tag["value"] for tag in told.get("tags", [])},
            "params": {},
            "metrics": [],
        }
        return {"run": self.shown(run_id)}

    def on_runs_get(self, told: dict[str, Any]) -> dict[str, Any]:
        return {"run": self.shown(told["run_id"])}

    def on_runs_search(self, told: dict[str, Any]) -> dict[str, Any]:
        wanted = [part.split(" = ") for part in told["filter"].split(" and ")]
        tags = {key.removeprefix("tags.").strip("`"): value.strip("'") for key, value in wanted}
        found = [
            run_id
            for run_id, run in self.runs.items()
            if run["experiment"] in told["experiment_ids"] and tags.items() <= run["tags"].items()
        ]
        return {"runs": [self.shown(run_id) for run_id in found]}

    def on_runs_update(self, told: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[told["run_id"]]
        run["status"] = told.get("status", run["status"])
        return {"run_info": self.shown(told["run_id"])["info"]}

    def on_runs_log_batch(self, told: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[told["run_id"]]
        run["metrics"] += told.get("metrics", [])
        for param in told.get("params", []):
            assert run["params"].setdefault(param["key"], param["value"]) == param["value"]
        run["tags"] |= {tag["key"]: tag["value"] for tag in told.get("tags", [])}
        return {}

    def on_metrics_get_history(self, told: dict[str, Any]) -> dict[str, Any]:
        metrics = self.runs[told["run_id"]]["metrics"]
        return {"metrics": [m for m in metrics if m["key"] == told["metric_key"]]}

    def shown(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        experiment = run["experiment"]
        info = {
            "run_id": run_id,
            "run_uuid": run_id,
            "experiment_id": experiment,
            "status": run["status"],
            "start_time": 0,
            "artifact_uri": f"mlflow-artifacts:/{experiment}/{run_id}/artifacts",
            "lifecycle_stage": "active",
        }
        pairs = {
            kind: [{"key": key, "value": value} for key, value in run[kind].items()]
            for kind in ("tags", "params")
        }
        return {"info": info, "data": pairs}


class _Handler(BaseHTTPRequestHandler):
    server: MlflowServer

    def do_GET(self) -> None:
        told = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        self._answer(told)

    def do_POST(self) -> None:
        self._answer(json.loads(self._body()))

    def do_PUT(self) -> None:
        path = self.path.removeprefix(ARTIFACTS)
        self.server.files[path.partition("/artifacts/")[2]] = self._body()
        self._send(self.server.status, {})

    def log_message(self, *_arguments: Any) -> None:
        """Nothing: the tests look at what was told."""

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, told: dict[str, Any]) -> None:
        server = self.server
        server.authorizations.append(self.headers.get("Authorization", ""))
        time.sleep(server.delay_s)
        if server.status != 200:
            code = "INVALID_PARAMETER_VALUE" if server.status == 400 else "INTERNAL_ERROR"
            self._send(server.status, {"error_code": code, "message": "as told"})
            return
        answer = server.answer(urlsplit(self.path).path.removeprefix(API), told)
        missing = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "there is none"}
        self._send(404 if answer is None else 200, missing if answer is None else answer)

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def mlflow_server() -> Iterator[MlflowServer]:
    """A server while the block runs."""
    server = MlflowServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
