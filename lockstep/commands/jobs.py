"""`lockstep submit` and `lockstep jobs`: runs on a cluster, from any machine that reaches it."""

import getpass
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import UserError
from lockstep.commands.manifests import (
    PriorityClass,
    WorkerMemory,
    follow_run,
    is_kubernetes,
    kubernetes_jobs,
    submit_to_kubernetes,
)
from lockstep.commands.options import JobFile, Json, Overrides, console, print_json

if TYPE_CHECKING:
    from cluster.submit import RayJobs

jobs_app = typer.Typer(
    help="Runs on a cluster: list, status, logs, stop, result, queue.", no_args_is_help=True
)

HeadAddress = Annotated[
    str | None,
    typer.Option(
        envvar="LOCKSTEP_ADDRESS",
        help="The cluster's dashboard, such as http://HEAD:8265; or kubernetes[://NAMESPACE].",
    ),
]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")]
User = Annotated[str | None, typer.Option(help="Whose run it is; your login name without it.")]


def submit(
    job: JobFile,
    address: HeadAddress = None,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="Submit as a RayJob to Kubernetes.")
    ] = False,
    queue: Annotated[
        bool, typer.Option("--queue", help="Wait in the cluster's queue for room and one's turn.")
    ] = False,
    priority: Annotated[
        int, typer.Option(min=-10, max=10, help="In the queue: greater goes first.")
    ] = 0,
    user: User = None,
    run_id: Annotated[
        str | None, typer.Option(help="Name of the run; submitting it again starts no second one.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Environment variable the run needs; a secret."),
    ] = None,
    cluster_dir: Annotated[
        str | None,
        typer.Option(help="Folder on the cluster for relative paths; this folder's path without."),
    ] = None,
    worker_memory: WorkerMemory = None,
    priority_class: PriorityClass = None,
    any_version: Annotated[
        bool, typer.Option("--any-version", help="Submit although versions differ.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Sets cluster.workers.")] = None,
    overrides: Overrides = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show what the run prints, to its end.")
    ] = False,
    is_json: Json = False,
) -> None:
    """Send a job to a cluster; it runs there whatever becomes of this machine."""
    if priority and not queue:
        raise UserError("--priority has no effect without --queue. Add it, or leave --priority.")
    on_kubernetes = kubernetes or is_kubernetes(address)
    if on_kubernetes:
        _check_kubernetes(address, queue, cluster_dir)
    elif worker_memory or priority_class:
        name = "--worker-memory" if worker_memory else "--priority-class"
        raise UserError(f"{name} has no effect without --kubernetes. Add it, or leave {name}.")
    from configs.load import load_job

    changes = [*(overrides or []), *([f"cluster.workers={workers}"] if workers else [])]
    loaded = load_job(job, changes)
    from lockstep.submit import SubmitOptions, check, packing, sent_files

    terminal = console(is_stderr=True)
    whose = user or getpass.getuser()
    sending = SubmitOptions(run_id, cluster_dir, env or [], any_version)
    if on_kubernetes:
        from lockstep.manifests import RunOptions

        options = RunOptions(worker_memory, priority_class, whose)
        runs, view = submit_to_kubernetes(loaded, address or "kubernetes", sending, options)
        print(f"{view.run_id}: {view.status}", file=sys.stderr)
        if follow or not is_json:
            follow_run(runs, view.run_id, is_json)
        else:
            print_json(asdict(view))
        return
    with packing(loaded, sending) as packed:
        sent = sent_files(packed)
        for name, size in sent.items():
            terminal.print(f"sends {name} ({size:,} bytes)", highlight=False)
        cluster = _cluster(address)
        for warning in check(packed, cluster.look(packed), any_version):
            terminal.print(f"warning: {warning}", highlight=False)
        if queue:
            view = cluster.enqueue(packed, whose, priority)
        else:
            view = cluster.status(cluster.submit(packed, whose))
    if is_json:
        print_json({**asdict(view), "sent": sent})
    else:
        print(f"{view.run_id}: {view.status}. {view.message}".rstrip())
        print(f"next: lockstep jobs logs -f {view.run_id} --address {address}")
    if follow:
        _show_logs(cluster, view.run_id, True, sys.stderr if is_json else sys.stdout)
        _exit_as(cluster.status(view.run_id).status)


@jobs_app.command("list")
def list_runs(
    address: HeadAddress = None,
    user: Annotated[str | None, typer.Option(help="Only this user's.")] = None,
    is_json: Json = False,
) -> None:
    """All runs that the cluster remembers."""
    views = [view for view in _cluster(address).list() if user in (None, view.user)]
    if is_json:
        print_json({"runs": [asdict(view) for view in views]})
        return
    rows = [[v.run_id, v.name, v.user, v.status, str(v.attempt), _short(v.message)] for v in views]
    _table(["run", "job", "user", "status", "attempt", ""], rows)


@jobs_app.command()
def status(run: RunId, address: HeadAddress = None, is_json: Json = False) -> None:
    """How a run is doing."""
    view = _cluster(address).status(run)
    if is_json:
        print_json(asdict(view))
        return
    print(f"{view.run_id} ({view.name}, {view.user}): {view.status}, attempt {view.attempt}")
    print(f"on the cluster: {view.run_folder}")
    if view.message:
        print(view.message)


def _check_kubernetes(address: str | None, queue: bool, cluster_dir: str | None) -> None:
    """Refuse what would have no effect there."""
    if address and not is_kubernetes(address):
        raise UserError(
            f"received --kubernetes, and --address (or LOCKSTEP_ADDRESS) {address}; one of them is "
            "allowed. Leave the one, or give --address kubernetes://NAMESPACE."
        )
    if queue:
        raise UserError("--queue has no effect on Kubernetes, where Kueue decides. Leave it.")
    if cluster_dir:
        raise UserError(
            "--cluster-dir has no effect on Kubernetes, where relative paths start from the volume "
            "that the template mounts. Leave it."
        )


@jobs_app.command()
def logs(
    run: RunId,
    address: HeadAddress = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="To the run's end.")] = False,
    is_json: Json = False,
) -> None:
    """What a run prints, over all its attempts. With -f the exit status is the run's."""
    cluster = _cluster(address)
    if is_json:
        print_json({"run_id": run, "logs": "".join(cluster.logs(run, follow))})
    else:
        _show_logs(cluster, run, follow, sys.stdout)
    if follow:
        _exit_as(cluster.status(run).status)


@jobs_app.command()
def stop(run: RunId, address: HeadAddress = None, is_json: Json = False) -> None:
    """Let a run write a checkpoint and end; submitting it again resumes it."""
    view = _cluster(address).stop(run)
    if is_json:
        print_json(asdict(view))
    else:
        print(f"{view.run_id}: {view.status}. {view.message}".rstrip())


@jobs_app.command()
def result(
    run: RunId,
    address: HeadAddress = None,
    output: Annotated[
        Path | None, typer.Option(help="New folder that receives artifact and records.")
    ] = None,
    is_json: Json = False,
) -> None:
    """The summary of a run that has ended, and its artifact."""
    answer = _cluster(address).result(run, output)
    if is_json:
        print_json({**answer, "output": str(output) if output else None})
        return
    from lockstep import render

    render.show_summary(console(is_stderr=False), answer["summary"])
    if output is not None:
        print(f"{len(answer['files'])} files: {output}")


@jobs_app.command()
def queue(address: HeadAddress = None, is_json: Json = False) -> None:
    """Who runs, who waits, in which order and why."""
    standings = _cluster(address).queue()
    if is_json:
        print_json({"queue": standings})
        return
    rows = [
        [
            str(one["position"] or "-"),
            one["run_id"],
            one["user"],
            str(one["priority"]),
            one["reason"],
        ]
        for one in standings
    ]
    _table(["position", "run", "user", "priority", ""], rows)


@jobs_app.command()
def quota(
    user: Annotated[str, typer.Argument(help="The user.")],
    address: HeadAddress = None,
    weight: Annotated[float, typer.Option(help="Share beside the other users'.", min=0.001)] = 1.0,
    max_cpus: Annotated[float | None, typer.Option(help="CPUs at a time.", min=0)] = None,
    max_gpus: Annotated[float | None, typer.Option(help="GPUs at a time.", min=0)] = None,
    max_runs: Annotated[int | None, typer.Option(help="Runs at a time.", min=0)] = None,
    is_json: Json = False,
) -> None:
    """Say what a user may have of the queue's cluster; what is not given is not bounded."""
    from cluster.shares import Terms

    users = _cluster(address).set_terms(user, Terms(weight, max_cpus, max_gpus, max_runs))["users"]
    if is_json:
        print_json({"users": users})
        return
    rows = [
        [name, *("-" if v is None else f"{v:g}" for v in terms.values())]
        for name, terms in users.items()
    ]
    _table(["user", "weight", "CPUs", "GPUs", "runs"], rows)


def _cluster(address: str | None) -> Any:
    """`RayJobs` or `KubernetesJobs`: the same methods."""
    if not address:
        raise UserError(
            "no cluster is named. Give --address http://HEAD:8265 or --address kubernetes, or set "
            "LOCKSTEP_ADDRESS."
        )
    if is_kubernetes(address):
        return kubernetes_jobs(address)
    from cluster.submit import RayJobs

    return RayJobs(address)


def _show_logs(cluster: "RayJobs", run_id: str, follow: bool, out: Any) -> None:
    for piece in cluster.logs(run_id, follow):
        out.write(piece)
        out.flush()


def _exit_as(status: str) -> None:
    code = {"done": 0, "stopped": 130}.get(status, 3)
    if code:
        raise typer.Exit(code)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:97]}..."


def _table(head: list[str], rows: list[list[str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console(is_stderr=False).print(table)
