"""Kubernetes: the manifests of a run, runs made from templates, a node that leaves."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import UserError
from lockstep.commands.options import JobFile, Json, Overrides, print_json

if TYPE_CHECKING:
    from lockstep.kubernetes_jobs import KubernetesJobs
    from lockstep.manifests import KubernetesRun

Overlay = Annotated[
    str, typer.Option(help="A name below deploy/overlays, or a folder with a kustomization.yaml.")
]
RunId = Annotated[str | None, typer.Option(help="Name of the run; the same name is the same run.")]
WorkerMemory = Annotated[
    str | None, typer.Option(help="Memory of each worker, such as 8Gi; the template's without it.")
]
PriorityClass = Annotated[
    str | None, typer.Option(help="Kueue's priority class; the template's without it.")
]
Namespace = Annotated[
    str | None, typer.Option(help="Namespace of the cluster; the kubeconfig's without it.")
]
Context = Annotated[
    str | None, typer.Option(help="Context of the kubeconfig; the current one without it.")
]


def render(
    job: JobFile,
    overlay: Overlay = "dev",
    overrides: Overrides = None,
    run_id: RunId = None,
    worker_memory: WorkerMemory = None,
    priority_class: PriorityClass = None,
    is_json: Json = False,
) -> None:
    """Print the Kubernetes manifests of a run: lockstep render JOB | kubectl apply -f -."""
    run = kubernetes_run(job, overrides, run_id, worker_memory, priority_class)
    from lockstep import kustomize, manifests

    template = manifests.training_template(kustomize.render(kustomize.overlay_folder(overlay)))
    objects = manifests.run_manifests(template, run)
    if is_json:
        print_json({"apiVersion": "v1", "kind": "List", "items": objects})
        return
    import yaml

    yaml.safe_dump_all(objects, sys.stdout, sort_keys=False, width=100)


def launch(
    template: Annotated[str, typer.Argument(help="A suspended RayJob, such as retraining.")],
    exclusive: Annotated[
        bool,
        typer.Option(
            "--exclusive", help="Follow a run of this template that is under way, if there is one."
        ),
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    is_json: Json = False,
) -> None:
    """Run a copy of a template on Kubernetes, to its end. Status 3: it failed."""
    jobs = kubernetes_jobs(namespace, context)
    run_id = jobs.launch(template, is_exclusive=exclusive)
    print(f"run {run_id}", file=sys.stderr)
    follow_run(jobs, run_id, is_json)


def leave(
    within_s: Annotated[
        float, typer.Option(help="Seconds until the node goes.", min=1, max=86400)
    ] = 100.0,
    address: Annotated[str, typer.Option(help="The Ray cluster.")] = "auto",
) -> None:
    """Tell the cluster that the node this runs on goes soon, and wait for its hand-over."""
    from cluster.leave import leave as leave_cluster

    is_done = leave_cluster(within_s, address)
    print("handed over" if is_done else "the time is over; what was left goes on from elsewhere")


def kubernetes_run(
    job: Path,
    overrides: list[str] | None,
    run_id: str | None,
    worker_memory: str | None = None,
    priority_class: str | None = None,
) -> "KubernetesRun":
    """What is to run, read from the job's file and the Python files that it needs."""
    from configs.load import load_job
    from lockstep.code_files import code_files
    from lockstep.manifests import KubernetesRun, default_run_id

    loaded = load_job(job, list(overrides or []))
    folder = Path.cwd()
    return KubernetesRun(
        run_id or default_run_id(loaded),
        loaded,
        code_files(loaded, folder),
        folder,
        worker_memory,
        priority_class,
    )


def kubernetes_jobs(
    namespace: str | None, context: str | None, overlay: str | None = None
) -> "KubernetesJobs":
    """The runs of a namespace; made from an overlay's template, or from the one in the cluster."""
    try:
        from lockstep.kubernetes_client import KubernetesClient
    except ModuleNotFoundError as error:
        if error.name != "kubernetes":
            raise
        raise UserError(
            "Kubernetes needs the extra `kubernetes`. Install lockstep[kubernetes]."
        ) from None
    from lockstep import kustomize, manifests
    from lockstep.kubernetes_jobs import KubernetesJobs

    template = None
    if overlay is not None:
        rendered = kustomize.render(kustomize.overlay_folder(overlay))
        template = manifests.training_template(rendered)
        namespace = namespace or template["metadata"].get("namespace")
    return KubernetesJobs(KubernetesClient(namespace, context), template)


def follow_run(jobs: "KubernetesJobs", run_id: str, is_json: bool) -> None:
    """Show what a run prints until it ends; its status is the last word."""
    status = jobs.follow(run_id, lambda line: print(line, file=sys.stderr if is_json else None))
    if is_json:
        print_json(_facts(status))
    else:
        print(f"run {run_id}: {status.state}")


def _facts(status: Any) -> dict[str, Any]:
    return asdict(status)
