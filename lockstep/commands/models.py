"""`lockstep models`: the registry from the command line.

MODEL is NAME/NUMBER, NAME@ALIAS or NAME, which is its champion.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import UserError
from lockstep.commands.options import Json, console, print_json

if TYPE_CHECKING:
    from registry.store import AliasMove, Registry, Version

app = typer.Typer(help="Registered models: versions, aliases, history.", no_args_is_help=True)

_CHAMPION = "champion"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="NAME/NUMBER, NAME@ALIAS or NAME.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A model's name.")]
Alias = Annotated[str, typer.Option(help="The alias to move.")]
Why = Annotated[str, typer.Option(help="The reason; it stays in the history.")]
Who = Annotated[str, typer.Option(help="Who does it; user@host without it.")]
Tags = Annotated[
    list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="A tag; repeatable.")
]


@app.command("list")
def list_models(is_json: Json = False) -> None:
    """All models with their aliases."""
    from lockstep import models, render_models

    found = models.list_models(models.open_registry())
    if is_json:
        print_json({"models": found})
    else:
        render_models.show_models(console(is_stderr=False), found)


@app.command()
def show(model: Model, is_json: Json = False) -> None:
    """NAME: its versions and the newest moves. NAME/NUMBER or NAME@ALIAS: all of one version."""
    from lockstep import models, render_models

    registry, terminal = models.open_registry(), console(is_stderr=False)
    is_whole = "/" not in model and "@" not in model
    if is_whole:
        record = models.show_model(registry, model)
    else:
        record = models.version_record(models.recorded(registry, model))
    if is_json:
        print_json(record)
    elif is_whole:
        render_models.show_versions(terminal, record)
    else:
        render_models.show_version(terminal, record)


@app.command()
def history(
    name: Name,
    alias: Annotated[str | None, typer.Option(help="Of this alias only.")] = None,
    is_json: Json = False,
) -> None:
    """Every move of a model's aliases, with who and why."""
    from lockstep import models, render_models

    moves = [models.move_record(m) for m in models.open_registry().history(name, alias)]
    if is_json:
        print_json({"name": name, "history": moves})
    else:
        render_models.show_moves(console(is_stderr=False), moves)


@app.command()
def compare(
    versions: Annotated[list[str], typer.Argument(metavar="MODEL MODEL...", help="Two or more.")],
    is_json: Json = False,
) -> None:
    """Metrics and origin of versions beside each other."""
    from lockstep import models, render_models

    if len(versions) < 2:
        raise UserError(f"received one model, {versions[0]}; two or more are compared. Add one.")
    registry = models.open_registry()
    compared = models.compare([models.recorded(registry, version) for version in versions])
    if is_json:
        print_json(compared)
    else:
        render_models.show_compared(console(is_stderr=False), compared)


@app.command()
def register(
    artifact: Annotated[Path, typer.Argument(help="The artifact folder of a run or an import.")],
    name: Annotated[str, typer.Option(help="The model that gets a new version.")],
    description: Annotated[str, typer.Option(help="For people.")] = "",
    tags: Tags = None,
    parent: Annotated[int | None, typer.Option(help="Version it was trained from.")] = None,
    key: Annotated[
        str | None, typer.Option(help="Makes it happen once, however often it is said.")
    ] = None,
    is_json: Json = False,
) -> None:
    """Copy an artifact into the registry as a model's next version."""
    from lockstep import models

    pairs = _pairs(tags or [])
    version = models.open_registry().register(
        name, artifact, description=description, tags=pairs, parent=parent, key=key
    )
    _print_version(version, f"{version}: {version.artifact}", is_json)


@app.command()
def promote(
    model: Model,
    alias: Alias = _CHAMPION,
    why: Why = "",
    who: Who = "",
    expected: Annotated[
        str | None,
        typer.Option(help="Only if the alias points to this number now; `none`: to nothing."),
    ] = None,
    is_json: Json = False,
) -> None:
    """Point an alias (champion) to a version, at once for all who look. Its files are verified."""
    from lockstep import models
    from registry.store import ANY

    if "/" not in model and "@" not in model:
        raise UserError(
            f"received {model!r}, which is the champion itself; name the version that {alias} is "
            f"to point to: {model}/NUMBER or {model}@ALIAS."
        )
    condition = ANY if expected is None else _number_or_none(expected)
    registry = models.open_registry()
    version = registry.resolve(model)
    registry.require_intact(version)
    move = registry.set_alias(
        version.name,
        alias,
        version.number,
        who=who or models.who(),
        why=why or "promoted by hand",
        expected=condition,
    )
    _print_move(registry, move, is_json)


@app.command()
def rollback(
    name: Name, alias: Alias = _CHAMPION, why: Why = "", who: Who = "", is_json: Json = False
) -> None:
    """Point an alias (champion) back to what it pointed to before."""
    from lockstep import models

    registry = models.open_registry()
    move = registry.rollback(
        name, alias=alias, who=who or models.who(), why=why or "rolled back by hand"
    )
    _print_move(registry, move, is_json)


@app.command()
def unalias(
    model: Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="The alias to take away.")],
    why: Why = "",
    who: Who = "",
    is_json: Json = False,
) -> None:
    """Take an alias away; its history stays."""
    from lockstep import models
    from registry.references import parse_reference

    wanted = parse_reference(model)
    if "@" not in model or wanted.alias is None:
        raise UserError(f"received {model!r}; NAME@ALIAS is allowed. Name the alias.")
    registry = models.open_registry()
    why = why or "taken away by hand"
    move = registry.set_alias(wanted.name, wanted.alias, None, who=who or models.who(), why=why)
    _print_move(registry, move, is_json)


@app.command()
def describe(
    model: Model,
    text: Annotated[str | None, typer.Argument(help="The new description.")] = None,
    tags: Annotated[
        list[str] | None,
        typer.Option("--tag", metavar="KEY=VALUE", help="Set a tag; KEY= takes it away."),
    ] = None,
    is_json: Json = False,
) -> None:
    """Change what is written about a version: its description and tags."""
    from lockstep import models

    registry = models.open_registry()
    version = models.recorded(registry, model)
    pairs = {key: value or None for key, value in _pairs(tags or []).items()}
    version = registry.annotate(version.name, version.number, description=text, tags=pairs)
    _print_version(version, f"{version}: {version.description}", is_json)


@app.command()
def delete(
    model: Annotated[str, typer.Argument(metavar="NAME/NUMBER", help="One version.")],
    is_json: Json = False,
) -> None:
    """Delete a version's files; its record stays. What an alias holds is refused."""
    from lockstep import models
    from registry.references import parse_reference

    wanted = parse_reference(model)
    if wanted.number is None:
        raise UserError(f"received {model!r}; NAME/NUMBER is allowed. Name the version by number.")
    registry = models.open_registry()
    registry.delete(wanted.name, wanted.number)
    version = registry.version(wanted.name, wanted.number)
    _print_version(version, f"{version} is deleted", is_json)


@app.command()
def verify(
    versions: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="All without any.")
    ] = None,
    is_json: Json = False,
) -> None:
    """Read and hash every file of versions. Status 3: some are not what was registered."""
    from lockstep import models, render_models

    registry = models.open_registry()
    if versions:
        chosen = [registry.resolve(version) for version in versions]
    else:
        every = [v for model in registry.models() for v in registry.versions(model.name)]
        chosen = [version for version in every if version.state == "ready"]
    records = [
        {**models.version_record(version), "problems": registry.verify(version)}
        for version in chosen
    ]
    damaged = sum(bool(record["problems"]) for record in records)
    if is_json:
        print_json({"versions": records, "damaged": damaged})
    else:
        render_models.show_verified(console(is_stderr=False), records)
    if damaged:
        raise typer.Exit(3)


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--tag received {text!r}; KEY=VALUE is allowed, such as team=ops.")
        pairs[key.strip()] = value
    return pairs


def _number_or_none(text: str) -> int | None:
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"--expected received {text!r}; the number of a version, or none, is allowed."
        ) from None


def _print_version(version: "Version", line: str, is_json: bool) -> None:
    from lockstep import models

    if is_json:
        print_json(models.version_record(version))
    else:
        print(line)


def _print_move(registry: "Registry", move: "AliasMove", is_json: bool) -> None:
    from lockstep import models, render_models

    record = models.move_record(move)
    if not is_json:
        print(render_models.move_line(record))
        return
    number = move.to_number if move.to_number is not None else move.from_number
    version = {} if number is None else models.version_record(registry.version(move.name, number))
    print_json({**version, "move": record})
