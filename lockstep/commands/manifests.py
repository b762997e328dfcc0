"""Kubernetes: the manifests of a run, runs made from templates, a node that leaves."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import UserError
from lockstep.commands.options import JobFile, Json, Overrides, print_json

if TYPE_CHECKING:
    from cluster.submit import Packed, RunView
    from configs.schema import Job
    from lockstep.kubernetes_jobs import KubernetesJobs
    from lockstep.manifests import RunOptions
    from lockstep.submit import SubmitOptions

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
    from configs.load import load_job

    loaded = load_job(job, list(overrides or []))  # a mistake is told before Ray is imported
    from lockstep import kustomize, manifests
    from lockstep.submit import SubmitOptions

    template = manifests.training_template(kustomize.render(kustomize.overlay_folder(overlay)))
    options = manifests.RunOptions(worker_memory, priority_class)
    name = run_id or manifests.default_run_id(loaded)
    with _packed(loaded, template, SubmitOptions(name, is_reproducible=True)) as (packed, whole):
        options = replace(options, standbys=whole.cluster.standbys)
        objects = manifests.run_manifests(template, packed, options)
    if is_json:
        print_json({"apiVersion": "v1", "kind": "List", "items": objects})
    else:
        kustomize.write(objects, sys.stdout)


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
    jobs = kubernetes_jobs(f"kubernetes://{namespace or ''}", context)
    run_id = jobs.launch(template, is_exclusive=exclusive)
    print(f"run {run_id}", file=sys.stderr)
    follow_run(jobs, run_id, is_json)


def leave(
    within_s: Annotated[
        float, typer.Option(help="Seconds until the node goes.", min=1, max=86400)
    ] = 100.0,
    address: Annotated[str, typer.Option(help="The Ray cluster.")] = "auto",
    node_ip: Annotated[
        str | None, typer.Option(help="Which node, where this machine has several.")
    ] = None,
) -> None:
    """Tell the cluster that the node this runs on goes soon, and wait for its hand-over."""
    from cluster.leave import leave as leave_cluster

    is_done = leave_cluster(within_s, address, node_ip)
    print("handed over" if is_done else "the time is over; what was left goes on from elsewhere")


def submit_to_kubernetes(
    job: "Job", address: str, sending: "SubmitOptions", options: "RunOptions"
) -> "tuple[KubernetesJobs, RunView]":
    """Send a job as a RayJob; returns the namespace's runs, and the run."""
    from lockstep import manifests

    if sending.secrets:
        raise UserError(
            f"--env received {', '.join(sending.secrets)}; on Kubernetes runs have the secrets "
            "that the template refers to. Put them into the secret lockstep-object-store."
        )
    jobs = kubernetes_jobs(address)
    template = jobs.template
    sending = replace(sending, run_id=sending.run_id or manifests.new_run_id(job))
    with _packed(job, template, sending) as (packed, loaded):
        here = packed.versions.get("ray")
        for warning in manifests.check_ray(template, here, sending.is_any_version):
            print(f"warning: {warning}", file=sys.stderr)
        options = replace(options, standbys=loaded.cluster.standbys)
        return jobs, jobs.status(jobs.submit(packed, options))


@contextmanager
def _packed(
    job: "Job", template: dict[str, Any], sending: "SubmitOptions"
) -> "Iterator[tuple[Packed, Job]]":
    """A job as it travels, with what the template says of all runs."""
    from configs.load import load_job
    from lockstep import manifests
    from lockstep.submit import packing

    manifests.check_run_id(sending.run_id or "")
    whole = load_job(job, manifests.checkpoint_overrides(template, job))
    sending = replace(sending, cluster_dir=manifests.volume_folder(template))
    with packing(whole, sending) as packed:
        yield packed, whole


def is_kubernetes(address: str | None) -> bool:
    """Whether an address means Kubernetes: `kubernetes` or `kubernetes://NAMESPACE`."""
    return address == "kubernetes" or (address or "").startswith("kubernetes://")


def kubernetes_jobs(address: str = "kubernetes", context: str | None = None) -> "KubernetesJobs":
    """The runs of a namespace: the kubeconfig's, or the one that the address names."""
    namespace = address.removeprefix("kubernetes").removeprefix("://") or None
    try:
        from lockstep.kubernetes_client import KubernetesClient
    except ModuleNotFoundError as error:
        if error.name != "kubernetes":
            raise
        raise UserError(
            "Kubernetes needs the extra `kubernetes`. Install lockstep[kubernetes]."
        ) from None
    from lockstep.kubernetes_jobs import KubernetesJobs

    return KubernetesJobs(KubernetesClient(namespace, context))


def follow_run(jobs: "KubernetesJobs", run_id: str, is_json: bool) -> None:
    """Show what a run prints until it ends; its status is the last word."""
    out = sys.stderr if is_json else sys.stdout
    view = jobs.follow(run_id, lambda piece: print(piece, end="", file=out, flush=True))
    if is_json:
        print_json(asdict(view))
    else:
        print(f"run {run_id}: {view.status}")
