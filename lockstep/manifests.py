"""The Kubernetes objects of one training run, made from a template and a job. Pure.

A cluster holds a suspended RayJob as the template of its runs (deploy/base/training.yaml): image,
security, volumes, queue and all else that its administrators decide. A run is a copy of it with the
run's name, files and resources. Names are chosen so that the same run, submitted again, is the same
object, and so that a new attempt goes on from the checkpoints of the earlier ones.
"""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from configs.errors import JobError, UserError
from configs.load import dump_job, job_digest, load_job
from configs.schema import Job
from lockstep.kustomize import Manifest

RUN_LABEL = "lockstep/run"
TEMPLATE_LABEL = "lockstep/template"
ORIGIN_LABEL = "lockstep/made-from"
DIGEST_ANNOTATION = "lockstep/job-digest"

_JOB_FOLDER = "/etc/lockstep/job"
_JOB_FILE = "job.yaml"
_GPU = "nvidia.com/gpu"
_NAME_CHARACTERS = 47  # KubeRay appends to a RayJob's name what makes its cluster's and services'
_CONFIG_MAP_BYTES = 1_000_000  # the API server takes 1 MiB, names and braces included
_FROM_ANNOTATION = {  # a template with these labels would itself wait in the queue
    "lockstep/queue-name": "kueue.x-k8s.io/queue-name",
    "lockstep/priority-class": "kueue.x-k8s.io/priority-class",
}
_CHECKPOINTS = "lockstep/checkpoint-uri"


@dataclass(frozen=True)
class KubernetesRun:
    """A run to be made.

    Attributes:
        run_id: Its name, in Kubernetes and as a run folder.
        job: The job, as on the machine it is submitted from.
        code: The user's Python files by their path below the job's folder.
        folder: The job's folder, which relative names of Python files are relative to.
        worker_memory: Memory of each worker, such as 8Gi. None: the template's.
        priority_class: Kueue's priority. None: the template's.
    """

    run_id: str
    job: Job
    code: Mapping[str, bytes] = field(default_factory=dict)
    folder: Path = Path(".")
    worker_memory: str | None = None
    priority_class: str | None = None


def default_run_id(job: Job) -> str:
    """A name that is the same for the same job: submitting it twice is one run."""
    slug = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
    if not slug[:1].isalpha():
        slug = f"run-{slug}".rstrip("-")
    return f"{slug[: _NAME_CHARACTERS - 9].rstrip('-')}-{job_digest(job)[:8]}"


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


def run_manifests(template: Manifest, run: KubernetesRun) -> list[Manifest]:
    """The run's ConfigMap with its job, its RayJob, and the budget that protects its head.

    Raises:
        UserError: The run's name, its files or its resources do not fit.
        JobError: The job names files that the cluster cannot see.
    """
    check_run_id(run.run_id)
    job = job_in_cluster(template, run)
    files = {_JOB_FILE: dump_job(job).encode(), **run.code}
    ray_job = copy_of(template, run.run_id)
    metadata, spec = ray_job["metadata"], ray_job["spec"]
    metadata["annotations"][DIGEST_ANNOTATION] = job_digest(job)
    if run.priority_class is not None:
        _set_priority(metadata, run.priority_class)
    spec["entrypoint"] = (
        f"lockstep train {_JOB_FOLDER}/{_JOB_FILE} --address auto --run-id {run.run_id} "
        "--resume --json"
    )
    _set_workers(spec["rayClusterSpec"], run)
    for pod in _pods(spec["rayClusterSpec"]):
        for volume in pod["spec"].get("volumes", ()):
            if volume["name"] == "job":
                volume["configMap"] = {"name": run.run_id, "items": _items(files)}
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


def job_in_cluster(template: Manifest, run: KubernetesRun) -> Job:
    """The job with the user's files named as the pods see them.

    Raises:
        JobError: It names files that no volume of the template holds.
    """
    mounts = _mounts(template)
    values = run.job.model_dump()
    wrong = [
        f"{name}={path}"
        for name, path in _paths(run.job)
        if "://" not in path and not any(_is_below(path, mount) for mount in mounts)
    ]
    if wrong:
        raise JobError(
            f"received {', '.join(wrong)}, which pods do not see; object stores (s3://, gs://, "
            f"abfs://, hdfs://) and absolute paths below {' or '.join(mounts) or 'a volume'} are "
            f"allowed. Copy the files there and name them, as in --set {wrong[0].split('=')[0]}=..."
        )
    if not PurePosixPath(run.job.runs_dir).is_absolute():
        values["runs_dir"] = f"{mounts[0]}/{run.job.runs_dir}"
    place = (template["metadata"].get("annotations") or {}).get(_CHECKPOINTS)
    if place and run.job.checkpoint.uri is None:
        values["checkpoint"]["uri"] = place
    for section in ("model", "compile", "train"):
        values[section] = _with_code_in_pods(values[section], run)
    return load_job(values)


def _paths(job: Job) -> list[tuple[str, str]]:
    """Dotted field and path of all files that the job names and that travel in no ConfigMap."""
    found = [("model.file", job.model.file), ("data.ingest_dir", job.data.ingest_dir)]
    if PurePosixPath(job.runs_dir).is_absolute() or "://" in job.runs_dir:
        found.append(("runs_dir", job.runs_dir))
    if job.checkpoint.uri is not None:
        found.append(("checkpoint.uri", job.checkpoint.uri))
    for role in ("train", "validation", "test"):
        paths = getattr(job.data, role)
        found += [
            (f"data.{role}", path) for path in ([paths] if isinstance(paths, str) else paths or ())
        ]
    return [(name, path) for name, path in found if path is not None]


def _is_below(path: str, folder: str) -> bool:
    normal = PurePosixPath(path)
    return ".." not in normal.parts and normal.is_relative_to(folder)


def _mounts(template: Manifest) -> list[str]:
    """Where the template's claims are mounted in the workers."""
    pod = template["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    claims = {
        volume["name"] for volume in pod.get("volumes", ()) if "persistentVolumeClaim" in volume
    }
    mounts = pod["containers"][0].get("volumeMounts", ())
    found = [mount["mountPath"] for mount in mounts if mount["name"] in claims]
    if not found:
        raise UserError(
            "the template of training runs mounts no claim; runs need one that all pods see, for "
            "run folders and artifacts. Add it to the overlay."
        )
    return found


def _with_code_in_pods(value: Any, run: KubernetesRun) -> Any:
    """Names of the user's code, 'file.py:name', as the pods see them, wherever they stand."""
    if isinstance(value, list):
        return [_with_code_in_pods(element, run) for element in value]
    if isinstance(value, dict):
        return {
            _with_code_in_pods(key, run): _with_code_in_pods(element, run)
            for key, element in value.items()
        }
    place, separator, attribute = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not place.endswith(".py"):
        return value
    inside = _below_folder(place, run.folder)
    if inside is None or inside not in run.code:
        raise JobError(
            f"received {value}, which is not packed; Python files below {run.folder.absolute()}, "
            "the folder the job is submitted from, are allowed. Move it there."
        )
    return f"{_JOB_FOLDER}/{inside}{separator}{attribute}"


def _below_folder(place: str, folder: Path) -> str | None:
    path = folder.absolute() / place
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return None


def _set_workers(cluster: dict[str, Any], run: KubernetesRun) -> None:
    """As many worker pods as the job has workers and standbys, with what each reserves."""
    need = run.job.cluster
    group = cluster["workerGroupSpecs"][0]
    for name in ("replicas", "minReplicas", "maxReplicas"):
        group[name] = need.workers + need.standbys
    resources = group["template"]["spec"]["containers"][0]["resources"]
    has_gpus = _GPU in resources["limits"]
    if need.gpus_per_worker and not has_gpus:
        raise UserError(
            f"cluster.gpus_per_worker={need.gpus_per_worker}, and the template's workers have no "
            "GPU. Use an overlay with the component gpu, or set cluster.gpus_per_worker to 0."
        )
    for amounts in (resources["requests"], resources["limits"]):
        amounts["cpu"] = str(need.cpus_per_worker)
        if run.worker_memory is not None:
            amounts["memory"] = _checked_memory(run.worker_memory)
        if need.gpus_per_worker:
            amounts[_GPU] = str(need.gpus_per_worker)
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
