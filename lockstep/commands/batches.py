"""`lockstep batches`: batch jobs of a prediction service, from anywhere."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from configs.errors import UserError
from lockstep.batch_client import (
    DEFAULT_SERVER,
    SERVER_VARIABLE,
    BatchClient,
    read_key,
)
from lockstep.commands.options import Json, console, names, print_json

app = typer.Typer(help="Batch jobs of a prediction service.", no_args_is_help=True)

Server = Annotated[
    str | None,
    typer.Option(help=f"URL of the service; else {SERVER_VARIABLE}, else {DEFAULT_SERVER}."),
]
KeyFile = Annotated[Path | None, typer.Option(help="File with the API key; else LOCKSTEP_API_KEY.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job, batch_...")]


@app.command()
def submit(
    model: Annotated[str, typer.Argument(help="name, name@alias or name/3.")],
    inputs: Annotated[
        list[str], typer.Argument(help="Local files, which are uploaded, or URIs and globs.")
    ],
    output: Annotated[
        str | None, typer.Option(help="Folder or URI on the server's side; else it keeps it.")
    ] = None,
    output_format: Annotated[
        Literal["parquet", "input"], typer.Option(help="input: the input's own.")
    ] = "parquet",
    keep: Annotated[
        str, typer.Option(help="keys, all, or columns with commas that join the output.")
    ] = "keys",
    on_error: Annotated[
        Literal["quarantine", "null_fill", "fail_fast"], typer.Option(help="For bad rows.")
    ] = "quarantine",
    priority: Annotated[int, typer.Option(help="Among your jobs; higher goes first.")] = 0,
    key: Annotated[
        str | None, typer.Option("--idempotency-key", help="Submit once, however often.")
    ] = None,
    on_server: Annotated[
        bool, typer.Option(help="Paths are the server's: upload nothing.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Wait for the end. Status 3: it failed.")] = False,
    server: Server = None,
    key_file: KeyFile = None,
    is_json: Json = False,
) -> None:
    """Submit a job."""
    client = _client(server, key_file)
    request: dict[str, Any] = {
        "model": model,
        "input": [_input(client, name, on_server) for name in inputs],
        "output_format": output_format,
        "keep": keep if keep in ("keys", "all") else names(keep),
        "on_error": on_error,
        "priority": priority,
    }
    if output is not None:
        request["output"] = output
    job = client.submit(request, key)
    if wait:
        job = _followed(client, job, is_json)
    _show(job, is_json)
    if wait and job["status"] != "completed":
        raise typer.Exit(3)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    everybody: Annotated[bool, typer.Option(help="All users' jobs; for admins.")] = False,
    server: Server = None,
    key_file: KeyFile = None,
    is_json: Json = False,
) -> None:
    """List the newest jobs."""
    jobs = _client(server, key_file).jobs(limit, everybody)
    if is_json:
        print_json({"jobs": jobs})
        return
    from rich.table import Table

    table = Table("job", "model", "status", "rows", "done", "bad", "left")
    for job in jobs:
        counts, model = job["request_counts"], job["model"]
        left = "" if job["eta_s"] is None else f"{job['eta_s']:g} s"
        table.add_row(
            job["id"],
            f"{model['name']}/{model['version']}",
            job["status"],
            f"{counts['total']:,}",
            f"{job['progress']:.0%}",
            f"{counts['failed']:,}",
            left,
        )
    console(is_stderr=False).print(table)


@app.command()
def status(
    job: JobName, server: Server = None, key_file: KeyFile = None, is_json: Json = False
) -> None:
    """Show a job: state, progress, place in the queue, time to the end."""
    _show(_client(server, key_file).job(job), is_json)


@app.command()
def cancel(
    job: JobName, server: Server = None, key_file: KeyFile = None, is_json: Json = False
) -> None:
    """Cancel a job; what was committed stays."""
    _show(_client(server, key_file).cancel(job), is_json)


@app.command()
def download(
    job: JobName,
    output: Annotated[Path, typer.Option(help="Folder that receives the output.")],
    server: Server = None,
    key_file: KeyFile = None,
    is_json: Json = False,
) -> None:
    """Fetch the output of a job that has ended: its parts, errors and manifest, checked."""
    manifest = _client(server, key_file).download(job, output)
    if is_json:
        print_json({"output": str(output), "manifest": manifest})
        return
    rows = manifest["rows"]
    print(f"{rows['done']:,} rows in {len(manifest['parts'])} parts: {output}")
    if rows["bad"]:
        print(f"{rows['bad']:,} bad rows: {output / 'errors'}")
    if not manifest["is_complete"]:
        print(f"incomplete: the job is {manifest['status']}")


def _client(server: str | None, key_file: Path | None) -> BatchClient:
    url = server or os.environ.get(SERVER_VARIABLE) or DEFAULT_SERVER
    return BatchClient(url, read_key(key_file))


def _input(client: BatchClient, name: str, on_server: bool) -> str:
    """A local file is uploaded and named by what the server calls it."""
    path = Path(name)
    if on_server or "://" in name or name.startswith("file-"):
        return name
    if not path.is_file():
        raise UserError(
            f"no file at {name}; local files and URIs are allowed. Check the path, or use "
            "--on-server for a path of the server's."
        )
    return str(client.upload(path)["id"])


def _followed(client: BatchClient, job: dict[str, Any], is_json: bool) -> dict[str, Any]:
    from rich.progress import Progress

    with Progress(console=console(is_stderr=is_json), transient=True) as progress:
        task = progress.add_task(job["id"], total=1.0)

        def tell(now: dict[str, Any]) -> None:
            progress.update(task, completed=now["progress"], description=now["status"])

        return client.wait(job["id"], tell)


def _show(job: dict[str, Any], is_json: bool) -> None:
    if is_json:
        print_json(job)
        return
    counts, model = job["request_counts"], job["model"]
    print(f"{job['id']}  {model['name']}/{model['version']}  {job['status']}")
    print(
        f" {counts['completed'] + counts['failed']:,} of {counts['total']:,} rows, "
        f"{counts['failed']:,} bad"
    )
    if job["position"]:
        print(f" {job['position']} job(s) of yours go before it")
    if job["eta_s"] is not None:
        print(f" about {job['eta_s']:g} s left")
    for problem in (job["errors"] or {"data": []})["data"]:
        where = f" (line {problem['line']})" if problem["line"] else ""
        print(f" {problem['code']}{where}: {problem['message']}")
