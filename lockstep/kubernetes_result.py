"""What a run has left on the volume, brought home by a pod that reads it.

The run's own pods are gone by then. A reader, made from the template so that it may run where they
did, prints the files as text, which is a pod's only way out that no wall closes; it is deleted
afterwards. Checked by length and SHA-256.
"""

import base64
import contextlib
import copy
import hashlib
import json
import shutil
import time
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.errors import RunUnknown
from configs.errors import EnvironmentFailure, UserError
from lockstep.kubernetes_client import AlreadyThere, KubernetesClient, NotThere
from lockstep.kustomize import Manifest

_WAIT_S = 300.0
_POLL_S = 1.0
_MOST_BYTES = 64 * 2**20
# Runs in the reader: a JSON line for the summary, one for each part of a file, one at the end.
_READER = """
import base64, hashlib, json, pathlib, sys
root, most, wants_files = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "files"
def say(**line): print(json.dumps(line), flush=True)
summary = root / "summary.json"
say(summary=json.loads(summary.read_text()) if summary.is_file() else None)
names = ("artifact", "summary.json", "report.html", "metrics.jsonl", "events.jsonl", "job.yaml")
found = [root / name for name in names]
files = sorted(p for f in found for p in (f.rglob("*") if f.is_dir() else [f]) if p.is_file())
total = sum(p.stat().st_size for p in files)
if not wants_files or total > most: files = []
for path in files:
    content = path.read_bytes()
    name = path.relative_to(root).as_posix()
    for start in range(0, max(len(content), 1), 98304):
        say(file=name, part=base64.b64encode(content[start : start + 98304]).decode())
    say(file=name, sha256=hashlib.sha256(content).hexdigest())
say(end=len(files), total=total)
"""


def fetch(
    client: KubernetesClient, template: Manifest, run_id: str, run_folder: str, output: Path | None
) -> dict[str, Any]:
    """`summary` and `files` (bytes by name) of a run; with `output` they are written there, whole.

    Raises:
        RunUnknown: The run has no summary yet.
        UserError: The output exists, or the artifact is too large for this way.
        EnvironmentFailure: The reader does not start, or is cut off.
    """
    if not run_folder:
        raise RunUnknown(f"{run_id} is no training run; its result is in the registry.")
    if output is not None and output.exists():
        raise UserError(f"--output received {output}, which exists; a new folder is allowed.")
    name = f"{run_id[:50]}-reader"
    pod = reader_pod(template, name, run_folder, output is not None)
    lines = _read(client, pod)
    summary, files, end = _collected(lines)
    if end is None:
        raise EnvironmentFailure(f"the pod {name} was cut off before its last line. Ask again.")
    if summary is None:
        raise RunUnknown(f"{run_id} has no summary in {run_folder}: it has not come to its end.")
    if output is not None:
        if end["total"] > _MOST_BYTES:
            raise UserError(
                f"the artifact of {run_id} has {end['total']:,} bytes; this way takes "
                f"{_MOST_BYTES:,}. Register it, or copy {run_folder} with kubectl cp."
            )
        _write(files, output)
    return {"summary": summary, "files": {name: len(content) for name, content in files.items()}}


def reader_pod(template: Manifest, name: str, run_folder: str, wants_files: bool) -> Manifest:
    """A pod like the template's workers, which reads a run folder and touches nothing."""
    spec = copy.deepcopy(template["spec"])
    worker = spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    container = worker["containers"][0]
    wanted = "files" if wants_files else "summary"
    reader = {
        "name": "reader",
        "image": container["image"],
        "command": ["python", "-P", "-c", _READER, run_folder, str(_MOST_BYTES), wanted],
        "securityContext": container.get("securityContext", {}),
        "resources": {
            "requests": {"cpu": "100m", "memory": "512Mi"},
            "limits": {"cpu": "1", "memory": "512Mi"},
        },
        "volumeMounts": [{"name": "data", "mountPath": _mount(worker), "readOnly": True}],
    }
    kept = ("securityContext", "serviceAccountName", "imagePullSecrets", "tolerations")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"lockstep/role": "reader"}},
        "spec": {
            **{key: worker[key] for key in kept if key in worker},
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "activeDeadlineSeconds": 900,
            "containers": [reader],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": _claim(worker)}}],
        },
    }


def _claim(worker: Manifest) -> str:
    return str(_data_volume(worker)["persistentVolumeClaim"]["claimName"])


def _data_volume(worker: Manifest) -> Manifest:
    volumes: list[Manifest] = worker["volumes"]
    return next(volume for volume in volumes if "persistentVolumeClaim" in volume)


def _mount(worker: Manifest) -> str:
    name = _data_volume(worker)["name"]
    mounts = worker["containers"][0]["volumeMounts"]
    return next(str(mount["mountPath"]) for mount in mounts if mount["name"] == name)


def _read(client: KubernetesClient, pod: Manifest) -> list[dict[str, Any]]:
    """What the reader prints; it is deleted in any case."""
    name = pod["metadata"]["name"]
    try:
        client.create(pod)
    except AlreadyThere:
        raise UserError(f"the pod {name} is at work for somebody else. Ask again.") from None
    try:
        _wait(client, name)
        texts = (line.partition(" ")[2] for line in client.log(name, follow=True))
        return [json.loads(text) for text in texts if text.startswith("{")]
    except ValueError as error:
        raise EnvironmentFailure(f"the pod {name} was cut off: {error}. Ask again.") from error
    finally:
        with contextlib.suppress(NotThere):
            client.delete("Pod", name)


def _wait(client: KubernetesClient, name: str) -> None:
    ends_at = time.monotonic() + _WAIT_S
    while True:
        status = client.get("Pod", name).get("status") or {}
        if status.get("phase") in ("Running", "Succeeded", "Failed"):
            return
        if time.monotonic() > ends_at:
            raise EnvironmentFailure(
                f"the pod {name} has not started within {_WAIT_S:g} s; kubectl describe says why."
            )
        time.sleep(_POLL_S)


def _collected(
    lines: list[dict[str, Any]],
) -> tuple[dict[str, Any] | None, dict[str, bytes], dict[str, Any] | None]:
    """Summary, whole files by name, and the last line."""
    summary, end = None, None
    parts: dict[str, bytearray] = {}
    whole: dict[str, bytes] = {}
    for line in lines:
        if "summary" in line:
            summary = line["summary"]
        elif "part" in line:
            parts.setdefault(line["file"], bytearray()).extend(base64.b64decode(line["part"]))
        elif "sha256" in line:
            content = bytes(parts.pop(line["file"], b""))
            if hashlib.sha256(content).hexdigest() != line["sha256"]:
                raise EnvironmentFailure(f"{line['file']} came damaged. Ask again.")
            whole[line["file"]] = content
        elif "end" in line:
            end = line
    if end is not None and end["end"] != len(whole):
        raise EnvironmentFailure(f"{len(whole)} of {end['end']} files came. Ask again.")
    return summary, whole, end


def _write(files: dict[str, bytes], output: Path) -> None:
    """All files or none."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, content in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise EnvironmentFailure(f"the reader named a file {name!r}, outside of its folder.")
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
    partial.rename(output)
