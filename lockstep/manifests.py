"""The Kubernetes objects of one training run, made from a template and a job. Pure.

A cluster holds a suspended RayJob as the template of its runs (deploy/base/training.yaml): image,
security, volumes, queue and all else that its administrators decide. A run is a copy of it with the
run's name, files and resources. Names are chosen so that the same run, submitted again, is the same
object, and so that a new attempt goes on from the checkpoints of the earlier ones.
"""

import copy
import hashlib
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from cluster.room import Shape
from cluster.submit import Packed
from configs.errors import JobError, UserError
from configs.load import job_digest
from configs.schema import Job
from lockstep.kustomize import Manifest
from lockstep.submit import MANIFEST, SUBMISSION, VERSIONS

RUN_LABEL = "lockstep/run"
TEMPLATE_LABEL = "lockstep/template"
ORIGIN_LABEL = "lockstep/made-from"
DIGEST = "lockstep/digest"
JOB_NAME = "lockstep/job"
RUN_FOLDER = "lockstep/run-folder"
USER = "lockstep/user"

_JOB_FOLDER = "/etc/lockstep/job"
_GPU = "nvidia.com/gpu"
_NAME_CHARACTERS = 47  # KubeRay appends to a RayJob's name what makes its cluster's and services'
_SLUG_CHARACTERS = _NAME_CHARACTERS - len("-20260101-000000-abcd")
_CONFIG_MAP_BYTES = 1_000_000  # the API server takes 1 MiB, names and braces included
_FROM_ANNOTATION = {  # a template with these labels would itself wait in the queue
    "lockstep/queue-name": "kueue.x-k8s.io/queue-name",
    "lockstep/priority-class": "kueue.x-k8s.io/priority-class",
}
_CHECKPOINTS = "lockstep/checkpoint-uri"


@dataclass(frozen=True)
class RunOptions:
    """What may be said of a run apart from its job.

    Attributes:
        worker_memory: Memory of each worker, such as 8Gi. None: the template's.
        priority_class: Kueue's priority. None: the template's.
        user: Who submits it.
        standbys: Spare hosts, each a pod as a worker's.
    """

    worker_memory: str | None = None
    priority_class: str | None = None
    user: str = ""
    standbys: int = 0


def default_run_id(job: Job) -> str:
    """A name that is the same for the same job: made twice, it is one run."""
    return f"{_slug(job.name)}-{job_digest(job)[:8]}"


def new_run_id(job: Job, now_s: float | None = None) -> str:
    """A name for a new run."""
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now_s))
    return f"{_slug(job.name)}-{moment}-{secrets.token_hex(2)}"


def _slug(name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug[:1].isalpha():
        slug = f"run-{slug}".rstrip("-")
    return slug[:_SLUG_CHARACTERS].rstrip("-")


def training_template(objects: list[Manifest], name: str = "training") -> Manifest:
    """The template of that name among rendered objects.

    Raises:
        UserError: There is none.
    """
    for manifest in objects:
        labels = manifest["metadata"].get("labels") or {}
        if manifest["kind"] == "RayJob" and labels.get(TEMPLATE_LABEL) == name:
            return manifest
    raise UserError(
        f"the overlay has no RayJob with the label {TEMPLATE_LABEL}: {name}. Build it on "
        "deploy/base, which has it."
    )


def checkpoint_overrides(template: Manifest, job: Job) -> list[str]:
    """Overrides by which a job's checkpoints go where the template wants those of all runs."""
    place = (template["metadata"].get("annotations") or {}).get(_CHECKPOINTS)
    return [f"checkpoint.uri={place}"] if place and job.checkpoint.uri is None else []


def volume_folder(template: Manifest) -> str:
    """Where the pods see the volume that they share: what relative paths are relative to.

    Raises:
        UserError: They share none.
    """
    pod = template["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    claims = {
        volume["name"] for volume in pod.get("volumes", ()) if "persistentVolumeClaim" in volume
    }
    for mount in pod["containers"][0].get("volumeMounts", ()):
        if mount["name"] in claims:
            return str(mount["mountPath"])
    raise UserError(
        "the template of training runs mounts no claim; runs need one that all pods see, for run "
        "folders and artifacts. Add it to the overlay."
    )


def run_manifests(
    template: Manifest, packed: Packed, options: RunOptions | None = None
) -> list[Manifest]:
    """The run's ConfigMap with what was packed, its RayJob, and the budget that keeps its head.

    Raises:
        UserError: The run's name, its files, its paths or its resources do not fit.
    """
    options = options or RunOptions()
    check_run_id(packed.run_id)
    _check_paths(packed, volume_folder(template))
    if packed.secrets:
        raise UserError(
            f"received {', '.join(sorted(packed.secrets))} as secrets; on Kubernetes runs have the "
            "secrets that the template refers to. Put them into the secret lockstep-object-store."
        )
    files = {
        path.relative_to(packed.folder).as_posix(): path.read_bytes()
        for path in sorted(packed.folder.rglob("*"))
        if path.is_file()
    }
    ray_job = copy_of(template, packed.run_id)
    metadata, spec = ray_job["metadata"], ray_job["spec"]
    metadata["annotations"] |= {
        DIGEST: _digest(files),
        JOB_NAME: packed.name,
        RUN_FOLDER: packed.run_folder,
        USER: options.user,
    }
    if options.priority_class is not None:
        _set_priority(metadata, options.priority_class)
    # Plain words: the operator's submitter puts them into a script of its own, unquoted.
    command = packed.entrypoint.removeprefix("exec ")
    spec["entrypoint"] = f"exec env -C {_JOB_FOLDER} {command}"
    _set_workers(spec["rayClusterSpec"], packed.shape, options)
    for pod in _pods(spec["rayClusterSpec"]):
        for volume in pod["spec"].get("volumes", ()):
            if volume["name"] == "job":
                volume["configMap"] = {"name": packed.run_id, "items": _items(files)}
    return [_config_map(ray_job, files), ray_job, head_budget(ray_job)]


def copy_of(template: Manifest, run_id: str) -> Manifest:
    """The template as a RayJob that runs: named, labelled, queued where the template says so."""
    found = template["metadata"]
    labels = dict(found.get("labels") or {})
    origin = labels.pop(TEMPLATE_LABEL, found["name"])
    labels |= {RUN_LABEL: run_id, ORIGIN_LABEL: origin}
    annotations = dict(found.get("annotations") or {})
    for ours, kueues in _FROM_ANNOTATION.items():
        if ours in annotations:
            labels[kueues] = annotations.pop(ours)
    for name in (
        "lockstep/purpose",
        _CHECKPOINTS,
        "kubectl.kubernetes.io/last-applied-configuration",
    ):
        annotations.pop(name, None)
    metadata = {"name": run_id, "labels": labels, "annotations": annotations}
    if "namespace" in found:
        metadata["namespace"] = found["namespace"]
    spec = copy.deepcopy(template["spec"])
    spec.pop("suspend", None)
    pods = [*_pods(spec["rayClusterSpec"]), spec.get("submitterPodTemplate")]
    for pod in filter(None, pods):
        pod.setdefault("metadata", {}).setdefault("labels", {})[RUN_LABEL] = run_id
    return {
        **{key: template[key] for key in ("apiVersion", "kind")},
        "metadata": metadata,
        "spec": spec,
    }


def head_budget(ray_job: Manifest) -> Manifest:
    """The budget that has a drain of nodes wait for the run's head.

    Workers may go at any time: they hand over. A head that goes takes its cluster along, and the
    run goes on in a new one from its newest checkpoint.
    """
    metadata = ray_job["metadata"]
    name = metadata["name"]
    labels = {RUN_LABEL: name, "lockstep/node": "head"}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(metadata, name),
        "spec": {"minAvailable": 1, "selector": {"matchLabels": labels}},
    }


def check_run_id(run_id: str) -> None:
    """Refuse names that Kubernetes or KubeRay would refuse, later and less clearly.

    Raises:
        UserError: It is none.
    """
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", run_id) or len(run_id) > _NAME_CHARACTERS:
        raise UserError(
            f"--run-id received {run_id!r} ({len(run_id)} characters); on Kubernetes at most "
            f"{_NAME_CHARACTERS} small letters, digits and '-' are allowed, a letter first and no "
            "'-' at the end. Choose another name."
        )


def _check_paths(packed: Packed, folder: str) -> None:
    named = [
        (name, path)
        for name, paths in sorted({**packed.inputs, **packed.outputs}.items())
        for path in ([paths] if isinstance(paths, str) else paths)
    ]
    wrong = [f"{name}={path}" for name, path in named if not _is_below(path, folder)]
    if wrong:
        raise JobError(
            f"received {', '.join(wrong)}, which pods do not see; object stores (s3://, gs://, "
            f"abfs://, hdfs://) and paths below {folder}, or relative to it, are allowed. Copy the "
            f"files there and name them, as in --set {wrong[0].partition('=')[0]}=..."
        )


def _is_below(path: str, folder: str) -> bool:
    normal = PurePosixPath(path)
    return ".." not in normal.parts and normal.is_relative_to(folder)


def _set_workers(cluster: dict[str, Any], shape: Shape, options: RunOptions) -> None:
    """As many worker pods as the job has workers and standbys, with what each reserves."""
    group = cluster["workerGroupSpecs"][0]
    for name in ("replicas", "minReplicas", "maxReplicas"):
        group[name] = shape.workers + options.standbys
    cpus, gpus = int(shape.worker.cpus), int(shape.worker.gpus)
    resources = group["template"]["spec"]["containers"][0]["resources"]
    if gpus and _GPU not in resources["limits"]:
        raise UserError(
            f"cluster.gpus_per_worker={gpus}, and the template's workers have no GPU. Use an "
            "overlay with the component gpu, or set cluster.gpus_per_worker to 0."
        )
    for amounts in (resources["requests"], resources["limits"]):
        amounts["cpu"] = str(cpus)
        if options.worker_memory is not None:
            amounts["memory"] = _checked_memory(options.worker_memory)
        if gpus:
            amounts[_GPU] = str(gpus)
        else:
            amounts.pop(_GPU, None)


def _checked_memory(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(Mi|Gi|Ti)", text):
        raise UserError(
            f"--worker-memory received {text!r}; a whole number with Mi, Gi or Ti is allowed, such "
            "as 8Gi."
        )
    return text


def _set_priority(metadata: dict[str, Any], name: str) -> None:
    if _FROM_ANNOTATION["lockstep/queue-name"] not in metadata["labels"]:
        raise UserError(
            f"--priority-class={name} has no effect without a queue. Use an overlay with the "
            "component kueue, or leave it."
        )
    metadata["labels"][_FROM_ANNOTATION["lockstep/priority-class"]] = name


def _pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def _metadata(of_run: Mapping[str, Any], name: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if "namespace" in of_run:
        metadata["namespace"] = of_run["namespace"]
    part_of = "app.kubernetes.io/part-of"
    metadata["labels"] = {part_of: "lockstep", RUN_LABEL: of_run["name"]}
    return metadata


def check_ray(template: Manifest, here: str | None, is_any_version: bool = False) -> list[str]:
    """Compare Ray's version with that of a template; returns warnings.

    The other versions are those of the image; a run looks at them before it begins.

    Raises:
        UserError: They differ, and may not.
    """
    there = str(template["spec"]["rayClusterSpec"].get("rayVersion", ""))
    if not there or there == here:
        return []
    text = f"versions differ: ray {here or 'none'} here, {there} in the cluster's template"
    if not is_any_version:
        raise UserError(
            f"{text}; the same ones are needed for the same numbers. Install the cluster's here, "
            "or submit with --any-version."
        )
    return [f"{text}."]


def _digest(files: Mapping[str, bytes]) -> str:
    """Of what makes the job: not of who sends it, and when."""
    manifest = json.loads(files.get(MANIFEST, b"{}"))
    kept = {key: value for key, value in manifest.items() if key not in (VERSIONS, SUBMISSION)}
    files = {**files, MANIFEST: json.dumps(kept).encode()}
    hashes = [(path, hashlib.sha256(content).hexdigest()) for path, content in files.items()]
    return hashlib.sha256(json.dumps(sorted(hashes)).encode()).hexdigest()[:16]


def _key(path: str) -> str:
    """A path as a key of a ConfigMap, which has no slashes."""
    return path.replace("/", "..")


def _items(files: Mapping[str, bytes]) -> list[dict[str, str]]:
    return [{"key": _key(path), "path": path} for path in sorted(files)]


def _config_map(ray_job: Manifest, files: Mapping[str, bytes]) -> Manifest:
    try:
        texts = {_key(path): files[path].decode() for path in sorted(files)}
    except UnicodeDecodeError as error:
        raise UserError(f"a packed Python file is not UTF-8: {error}. Save it as UTF-8.") from None
    size = len(json.dumps(texts))
    if size > _CONFIG_MAP_BYTES:
        largest = max(files, key=lambda path: len(files[path]))
        raise UserError(
            f"the job and its code take {size:,} bytes, most of it {largest}; a ConfigMap holds "
            f"{_CONFIG_MAP_BYTES:,}. Put large files on the volume, or the code into the image."
        )
    metadata = ray_job["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(metadata, metadata["name"]),
        "data": texts,
    }
