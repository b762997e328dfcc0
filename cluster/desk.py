"""The far side of the desk: answers one question on the cluster, as a short Ray job.

`python -m cluster.desk VERB QUESTION [SECRETS]`, with the question in base64. It prints one line
with the answer, or with what it refuses. The job's folder is what the user sent along.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.dashboard.utils import ray_address_to_api_server_url

from cluster import queue_actor
from cluster.desk_client import ANSWER, END, FILE, PART, REFUSAL
from cluster.jobs_api import JobsApi, newest_attempts
from cluster.look import look_everywhere
from cluster.queue_store import ENDED
from cluster.secret_keeping import drop_secrets, runs_with_old_secrets, taking_secrets
from configs.errors import LockstepError

_PART_BYTES = 192 * 1024
_RECORDS = ("summary.json", "job.yaml", "metrics.jsonl", "report.html", "environment.json")
_KEPT_FOR_S = 900.0


def main() -> None:
    """Answer, and end with status 0 also where something was refused."""
    verb, asked = sys.argv[1], json.loads(base64.b64decode(sys.argv[2]))
    secrets_uri = sys.argv[3] if len(sys.argv) > 3 else ""
    package = pack_folder(Path.cwd()) if verb == "enqueue" else b""
    try:
        if verb == "fetch":
            _fetch(Path(asked["run_folder"]), bool(asked["with_files"]))
            return
        _join()
        _sweep()
        with _secrets(secrets_uri, asked):
            answer = _VERBS[verb](asked, package)
        print(ANSWER + json.dumps(answer), flush=True)
    except LockstepError as error:
        print(REFUSAL + json.dumps(str(error)), flush=True)


def pack_folder(folder: Path) -> bytes:
    """All files below a folder as a zip: the same bytes for the same files."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                name = zipfile.ZipInfo(path.relative_to(folder).as_posix())
                archive.writestr(name, path.read_bytes())
    return packed.getvalue()


def _join() -> None:
    """Join the cluster as nobody in particular: what is started here outlives the job's folder."""
    os.environ.pop("RAY_JOB_CONFIG_JSON_ENV_VAR", None)
    os.chdir("/")
    ray.init(address="auto", namespace=queue_actor.NAMESPACE, log_to_driver=False, logging_level=40)


def _secrets(uri: str, asked: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    return taking_secrets(uri, asked["run_id"]) if uri else contextlib.nullcontext()


def _sweep() -> None:
    """Drop secrets of runs that have ended and could not do it themselves."""
    with contextlib.suppress(LockstepError, ray.exceptions.RayError):  # the next question sweeps
        old = runs_with_old_secrets()
        if old:
            for run_id in old - _live_runs():
                drop_secrets(run_id)


def _api_address() -> str:
    address: str = ray_address_to_api_server_url(ray.get_runtime_context().gcs_address)
    return address


def _live_runs() -> set[str]:
    """Ids of runs that go on, or may, as far as Ray and the queue know."""
    api = JobsApi(_api_address())
    live = {run_id for run_id, job in newest_attempts(api.jobs()).items() if not job.is_final}
    if api.has_queue():
        runs = queue_actor.call("runs")
        live |= {str(run["run_id"]) for run in runs if run["status"] not in ENDED}
    return live


def _look(asked: dict[str, Any], _: bytes) -> dict[str, Any]:
    return look_everywhere(asked["inputs"], asked["outputs"])


def _keep(asked: dict[str, Any], _: bytes) -> dict[str, Any]:
    return {"kept": asked["run_id"]}  # the secrets have been taken


def _drop(asked: dict[str, Any], _: bytes) -> dict[str, Any]:
    drop_secrets(asked["run_id"])
    return {}


def _enqueue(asked: dict[str, Any], package: bytes) -> dict[str, Any]:
    queue_actor.start()
    record: dict[str, Any] = queue_actor.call("submit", asked, package)
    return record


def _cancel(asked: dict[str, Any], _: bytes) -> dict[str, Any]:
    queue_actor.call("cancel", asked["run_id"])
    return {}


def _queued(_: dict[str, Any], __: bytes) -> dict[str, Any]:
    return {"runs": queue_actor.call("runs")}


def _standings(_: dict[str, Any], __: bytes) -> dict[str, Any]:
    return {"standings": queue_actor.call("standings")}


def _terms(asked: dict[str, Any], _: bytes) -> dict[str, Any]:
    queue_actor.start()
    return {"users": queue_actor.call("set_terms", asked["user"], asked["terms"])}


_VERBS: dict[str, Callable[[dict[str, Any], bytes], dict[str, Any]]] = {
    "look": _look,
    "keep": _keep,
    "drop": _drop,
    "enqueue": _enqueue,
    "cancel": _cancel,
    "queued": _queued,
    "standings": _standings,
    "terms": _terms,
}


def _fetch(run_folder: Path, with_files: bool) -> None:
    """Print a run's summary, after its files where they are asked for."""
    path = run_folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else None
    files: list[str] = []
    if with_files and summary is not None:
        told = [False]
        signal.signal(signal.SIGTERM, lambda *_: told.__setitem__(0, True))
        found = [run_folder / name for name in _RECORDS]
        found += sorted(path for path in (run_folder / "artifact").rglob("*") if path.is_file())
        for path in found:
            if path.is_file():
                files.append(path.relative_to(run_folder).as_posix())
                _send(path, files[-1])
    answer = {"summary": summary, "files": files, "run_folder": str(run_folder)}
    print(ANSWER + json.dumps(answer), flush=True)
    if files:  # once it has arrived, the copy in this job's log is of no use
        deadline = time.monotonic() + _KEPT_FOR_S
        while not told[0] and time.monotonic() < deadline:
            time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.ftruncate(sys.stdout.fileno(), 0)


def _send(path: Path, name: str) -> None:
    print(FILE + json.dumps(name), flush=True)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_PART_BYTES):
            digest.update(data)
            print(PART + base64.b64encode(data).decode(), flush=True)
    print(END + json.dumps(digest.hexdigest()), flush=True)


if __name__ == "__main__":
    main()
