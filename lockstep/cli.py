"""The `lockstep` command: each command a few lines, heavy imports inside it.

Exit status: 0 done, 1 a comparison found a difference that nothing explains, 2 the user's mistake,
3 the environment failed for good, 130 interrupted.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from configs.errors import LockstepError, UserError
from lockstep.commands import batches, jobs, manifests, models, retraining, serve, users
from lockstep.commands import schedule as schedule_commands
from lockstep.commands.importing import import_
from lockstep.commands.options import (
    Address,
    JobFile,
    Json,
    Overrides,
    be_quiet,
    console,
    names,
    numbers,
    print_json,
    terminable,
)

app = typer.Typer(
    name="lockstep",
    help="Train Keras Sequential models on a cluster as if on one machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Look at the data of a job.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@app.command()
def example(
    name: Annotated[str, typer.Argument(help="flights, digits or weather.")],
    root: Annotated[Path, typer.Option(help="Folder that receives NAME/.")] = Path("data"),
    is_json: Json = False,
) -> None:
    """Write an example's data as Parquet files, offline."""
    from lockstep.examples import write_example

    summary = write_example(name, root)
    if is_json:
        print_json({**vars(summary), "folder": str(summary.folder)})
        return
    for role, rows in summary.rows.items():
        print(f"{summary.folder / role}: {rows:,} rows")
    for note in summary.notes:
        print(note)
    print(f"next: lockstep train {summary.job_file}")


@app.command()
def train(
    job: JobFile,
    workers: Annotated[int | None, typer.Option(help="Sets cluster.workers.")] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    run_id: Annotated[str | None, typer.Option(help="Name of the run folder.")] = None,
    address: Address = None,
    verbose: Annotated[bool, typer.Option(help="Show what TensorFlow and Ray log.")] = False,
    chaos: Annotated[
        str, typer.Option(metavar="PLAN", help="Faults to go through, such as kill:any@every=20s.")
    ] = "",
    chaos_compare: Annotated[
        bool, typer.Option(help="Train undisturbed too, and compare the weights. Status 1: differ.")
    ] = False,
    is_json: Json = False,
) -> None:
    """Train a job with its workers, evaluate, and write the artifact."""
    if chaos_compare and not chaos:
        raise UserError("--chaos-compare has no effect without --chaos. Give a plan, or leave it.")
    changes = list(overrides or [])
    if workers is not None:
        changes.append(f"cluster.workers={workers}")
    from configs.load import load_job

    loaded = load_job(job, changes)  # a mistake is told before Ray is imported
    if not verbose:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from lockstep import api, render

    terminal = console(is_stderr=is_json)
    view = render.TrainingView(terminal)
    options = api.TrainOptions(run_id, resume, address, verbose, chaos)
    comparison: dict[str, Any] = {}
    with terminable():
        try:
            run = api.train(loaded, options=options, listener=view)
            if chaos_compare:
                from lockstep.chaos import compare_with_undisturbed

                comparison = compare_with_undisturbed(run, loaded, options=options, listener=view)
        finally:
            view.close()
    if is_json:
        print_json(run.summary | ({"comparison": comparison} if comparison else {}))
    else:
        render.show_summary(terminal, run.summary)
        render.show_comparison(terminal, comparison)
    if comparison.get("verdict") == "differs":
        raise typer.Exit(1)


@app.command()
def verify(
    job: JobFile,
    workers: Annotated[str, typer.Option(help="Numbers of workers, comma separated.")] = "2",
    steps: Annotated[int, typer.Option(help="Steps to take.")] = 50,
    overrides: Overrides = None,
    address: Address = None,
    is_json: Json = False,
) -> None:
    """Certify a job: its numbers on several workers against plain Keras. Status 1: they differ."""
    from configs.load import load_job

    loaded = load_job(job, list(overrides or []))
    counts = numbers("--workers", workers)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from lockstep import api, render

    terminal = console(is_stderr=is_json)
    certificate = api.verify(
        loaded,
        workers=counts,
        steps=steps,
        options=api.TrainOptions(address=address),
        listener=render.VerifyView(terminal),
    )
    if is_json:
        print_json(certificate)
    else:
        render.show_certificate(terminal, certificate)
    if certificate["verdict"] == "differs":
        raise typer.Exit(1)


@app.command()
def doctor(
    train: Annotated[
        bool, typer.Option("--train", help="Train a small model with two workers too.")
    ] = False,
    is_json: Json = False,
) -> None:
    """Look at what this machine needs, and say how to mend what is not right. Status 3: a fault."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from lockstep.doctor import examine

    findings = []
    for finding in examine(train):
        findings.append(finding)
        if not is_json:
            print(f"{finding.verdict:8}{finding.name:18}{finding.found}")
            if finding.remedy:
                print(f"{'':8}{finding.remedy}")
    if is_json:
        print_json([vars(finding) for finding in findings])
    if any(finding.verdict == "fault" for finding in findings):
        raise typer.Exit(3)


@data_app.command()
def show(
    job: JobFile,
    workers: Annotated[int | None, typer.Option(help="Sets cluster.workers.")] = None,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Rows of the sample.", min=1)] = 5,
    is_json: Json = False,
) -> None:
    """Files, columns, the first rows of the first batch, and which worker gets what."""
    changes = list(overrides or [])
    if workers is not None:
        changes.append(f"cluster.workers={workers}")
    from configs.load import load_job

    loaded = load_job(job, changes)
    from lockstep.data import describe_data
    from lockstep.render_data import show_data

    facts = describe_data(loaded, rows=rows)
    if is_json:
        print_json(facts)
    else:
        show_data(console(is_stderr=False), facts)


Model = Annotated[
    str,
    typer.Argument(
        help="NAME/NUMBER, NAME@ALIAS or NAME of a registered model; or the path of an artifact "
        "folder, .keras, .h5 or SavedModel folder."
    ),
]
Data = Annotated[list[str], typer.Argument(help="Parquet or CSV: files, folders or globs.")]
Features = Annotated[
    str, typer.Option(help="Input columns, comma separated, for a model without signature.json.")
]


@app.command()
def evaluate(
    model: Model,
    data: Data,
    features: Features = "",
    label: Annotated[str | None, typer.Option(help="Label column, if not the signature's.")] = None,
    on_null: Annotated[
        Literal["error", "drop"], typer.Option(help="What a row with null or NaN does.")
    ] = "error",
    is_json: Json = False,
) -> None:
    """Loss and metrics of a saved model on rows it may never have seen."""
    from lockstep.models import find_model

    path = find_model(model)  # a mistake is told before TensorFlow is imported
    be_quiet()
    from serving.evaluation import evaluate_files
    from serving.predictor import load_predictor

    predictor = load_predictor(path, names(features))
    results = evaluate_files(predictor, data, label=label, on_null=on_null)
    if is_json:
        print_json(results)
        return
    for name, value in results.items():
        print(f"{name}: {value:.6g}")


@app.command()
def predict(
    model: Model,
    inputs: Data,
    output: Annotated[Path, typer.Option(help="Folder that receives Parquet parts.")],
    features: Features = "",
    column: Annotated[str, typer.Option(help="Name of the new column.")] = "prediction",
    on_null: Annotated[
        Literal["error", "null"],
        typer.Option(help="null: rows with null or NaN get a null prediction."),
    ] = "error",
    is_json: Json = False,
) -> None:
    """Predict each row of Parquet or CSV files with a saved model."""
    from lockstep.models import find_model

    path = find_model(model)
    be_quiet()
    from serving.files import predict_files
    from serving.predictor import load_predictor

    predictor = load_predictor(path, names(features))
    summary = predict_files(predictor, inputs, output, on_null=on_null, column=column)
    if is_json:
        print_json({**vars(summary), "output": str(summary.output)})
        return
    print(f"{summary.rows:,} rows in {summary.seconds:.1f} s: {summary.output}")
    if summary.null_rows:
        print(f"{summary.null_rows:,} rows with null or NaN have no prediction")


@app.command()
def schema(
    pipeline: Annotated[bool, typer.Option("--pipeline", help="That of pipeline files.")] = False,
    service: Annotated[bool, typer.Option("--service", help="That of a service's file.")] = False,
) -> None:
    """Print the JSON Schema of job files, of pipeline files, or of a service's, for editors."""
    from configs.pipeline import Pipeline
    from configs.schema import Job
    from configs.service import ServiceConfig

    if pipeline and service:
        raise UserError("received --pipeline and --service; one of them is allowed.")
    print_json((ServiceConfig if service else Pipeline if pipeline else Job).model_json_schema())


models.app.command("import")(import_)
app.add_typer(models.app, name="models")
app.command()(retraining.retrain)
app.add_typer(schedule_commands.app, name="schedule")
app.command("serve")(serve.serve)
app.add_typer(users.app, name="users")
app.add_typer(batches.app, name="batches")
app.command()(jobs.submit)
app.add_typer(jobs.jobs_app, name="jobs")
app.command()(manifests.render)
app.command()(manifests.launch)
app.command()(manifests.leave)


def main() -> None:
    """Run a command; explained failures become one message and an exit status."""
    try:
        status = app(standalone_mode=False)
        if isinstance(status, int) and status:  # what typer.Exit said
            sys.exit(status)
    except LockstepError as error:
        sys.exit(_explain(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        show = getattr(error, "show", None)  # click's own usage errors
        if show is None:
            raise
        show()
        sys.exit(2)


def _explain(error: LockstepError) -> int:
    traceback = getattr(error, "traceback", "")
    if traceback:
        print(traceback.rstrip(), file=sys.stderr)
    prefix = "interrupted" if error.exit_status == 130 else "error"
    print(f"{prefix}: {error}", file=sys.stderr)
    return error.exit_status


if __name__ == "__main__":
    main()
