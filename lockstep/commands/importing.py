"""`lockstep models import`: a model file of any origin becomes a version in the registry."""

from pathlib import Path
from typing import Annotated

import typer

from lockstep.commands.options import Json, names, print_json


def import_(
    file: Annotated[Path, typer.Argument(help="A .keras or .h5 file, or a SavedModel folder.")],
    name: Annotated[str, typer.Option(help="The model in the registry; made where it is new.")],
    features: Annotated[
        str, typer.Option(help="Input columns in order, comma separated; one name: lists.")
    ] = "",
    label: Annotated[str, typer.Option(metavar="COLUMN", help="The label's column.")] = "",
    input_shape: Annotated[
        str,
        typer.Option(help="Lengths of a row's axes that the file leaves open, such as 28,28,1."),
    ] = "",
    trust: Annotated[
        bool, typer.Option(help="Allow code in the file to run. Only if you know who made it.")
    ] = False,
    alias: Annotated[str, typer.Option(help="An alias to set on the new version.")] = "",
    timeout_s: Annotated[float, typer.Option(help="How long the import may take.")] = 300.0,
    memory_mb: Annotated[int, typer.Option(help="How much memory the import may take.")] = 4000,
    is_json: Json = False,
) -> None:
    """Import a .keras or .h5 file of any Keras, or a SavedModel, as a version of a model."""
    from lockstep.importing import ImportOptions, import_file, parse_shape
    from lockstep.models import open_registry

    options = ImportOptions(
        features=names(features),
        label=label,
        input_shape=parse_shape(input_shape),
        is_trusted=trust,
        alias=alias,
        timeout_s=timeout_s,
        memory_mb=memory_mb,
    )
    record = import_file(open_registry(), file, name, options)
    if is_json:
        print_json(record)
        return
    print(f"{record['name']}/{record['version']}  {record['format']}  {record['digest'][:12]}")
    for warning in record["warnings"]:
        print(f"note: {warning}")
    print(f"artifact: {record['artifact']}")
