"""`lockstep retrain`: one run of a pipeline, and how its steps and its decision are shown."""

import os
from pathlib import Path
from typing import Annotated

import typer

from lockstep.commands.options import Address, Json, Overrides, console, print_json, terminable


def retrain(
    pipeline: Annotated[Path, typer.Argument(help="A pipeline file (YAML).")],
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option(help="Train even where nothing is new.")] = False,
    fresh: Annotated[
        bool, typer.Option(help="Give an unfinished run up instead of going on with it.")
    ] = False,
    address: Address = None,
    verbose: Annotated[bool, typer.Option(help="Show what TensorFlow and Ray log.")] = False,
    is_json: Json = False,
) -> None:
    """Train a candidate on new data, and promote it where it passes the gate."""
    from configs.load import load_pipeline

    loaded = load_pipeline(pipeline, list(overrides or []))  # told before Ray is imported
    if not verbose:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from lockstep.render_retrain import RetrainView, show_decision
    from lockstep.retrain import RetrainOptions
    from lockstep.retrain import retrain as run

    terminal = console(is_stderr=is_json)
    view = RetrainView(terminal)
    options = RetrainOptions(force, fresh, address, verbose)
    with terminable():
        try:
            result = run(loaded, options=options, listener=view)
        finally:
            view.close()
    if is_json:
        print_json(result)
    else:
        show_decision(terminal, result)
