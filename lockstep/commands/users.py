"""`lockstep users`: who may use the prediction service, and how much of it."""

import getpass
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from configs.errors import UserError, did_you_mean
from lockstep.commands.options import Json, console, print_json

if TYPE_CHECKING:
    from serving.accounts import Accounts, UserRecord

app = typer.Typer(help="Users of the prediction service.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The user's name.")]
DatabaseUrl = Annotated[
    str | None, typer.Option("--database", help="Of the service; LOCKSTEP_DATABASE without it.")
]
Limit = Annotated[
    list[str] | None,
    typer.Option(
        "--quota", metavar="NAME=NUMBER", help="Such as rows_per_day=1000000; none: no limit."
    ),
]
_QUOTAS = ("queued_jobs", "rows_per_day", "bytes", "requests_per_s", "concurrent_shards")


@app.command()
def add(
    name: Name,
    role: Annotated[Literal["user", "admin"], typer.Option(help="What the user may do.")] = "user",
    weight: Annotated[float, typer.Option(help="Share of the machine beside others.")] = 1.0,
    quota: Limit = None,
    database: DatabaseUrl = None,
    is_json: Json = False,
) -> None:
    """Make a user, and show the key: this once."""
    limits = _limits(quota)
    from serving.accounts import Quotas

    with _accounts(database) as accounts:
        key = accounts.add(name, who=_who(), role=role, weight=weight, quotas=Quotas(**limits))
    _show_key(name, key, is_json)


@app.command("list")
def show(database: DatabaseUrl = None, is_json: Json = False) -> None:
    """All users with quotas, keys and rows of today; no secrets."""
    with _accounts(database) as accounts:
        records = accounts.users()
    if is_json:
        print_json({"users": [_record(record) for record in records]})
        return
    from rich.table import Table

    table = Table("user", "role", "weight", "quotas", "rows today", "keys", "inputs")
    for record in records:
        account = record.account
        limits = {k: v for k, v in vars(account.quotas).items() if v is not None}
        keys = [key if end is None else f"{key} until {_time(end)}" for key, end in record.keys]
        table.add_row(
            account.user,
            account.role,
            f"{account.weight:g}",
            "\n".join(f"{limit}={value:g}" for limit, value in limits.items()),
            f"{record.rows_today:,}",
            "\n".join(keys) or "none",
            "\n".join(record.inputs),
        )
    console(is_stderr=False).print(table)


@app.command()
def rotate(
    name: Name,
    grace: Annotated[float, typer.Option(help="Seconds for which old keys work on.")] = 0.0,
    database: DatabaseUrl = None,
    is_json: Json = False,
) -> None:
    """Give a user a new key, and show it: this once."""
    with _accounts(database) as accounts:
        key = accounts.rotate(name, who=_who(), grace_s=grace)
    _show_key(name, key, is_json)


@app.command()
def revoke(
    name: Name,
    key: Annotated[str | None, typer.Option(help="Id of one key; all without it.")] = None,
    database: DatabaseUrl = None,
) -> None:
    """Take keys away; they stop working within a second."""
    with _accounts(database) as accounts:
        count = accounts.revoke(name, who=_who(), key_id=key)
    print(f"{name}: {count} keys revoked")


@app.command()
def remove(name: Name, database: DatabaseUrl = None) -> None:
    """Take a user away; the audit stays."""
    with _accounts(database) as accounts:
        accounts.remove(name, who=_who())
    print(f"{name} removed")


@app.command()
def grant(
    name: Annotated[str, typer.Argument(help="A user, or public: everybody.")],
    model: Annotated[str, typer.Argument(help="A model's name.")],
    withdraw: Annotated[
        bool, typer.Option("--withdraw", help="Take the grant back; of public: restrict it.")
    ] = False,
    database: DatabaseUrl = None,
) -> None:
    """Let a user, or everybody, use a model. Models are public until that is withdrawn."""
    with _accounts(database) as accounts:
        change = accounts.withdraw if withdraw else accounts.grant
        change(name, model, who=_who())
    print(f"{model}: {'no longer ' if withdraw else ''}granted to {name}")


@app.command()
def quota(
    name: Name,
    limits: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=NUMBER]...", help=f"{', '.join(_QUOTAS)}; none: no limit."),
    ] = None,
    weight: Annotated[float | None, typer.Option(help="Share of the machine.")] = None,
    role: Annotated[Literal["user", "admin"] | None, typer.Option(help="New role.")] = None,
    database: DatabaseUrl = None,
    is_json: Json = False,
) -> None:
    """Change a user's quotas, weight or role; what is not named stays."""
    changed = _limits(limits)
    with _accounts(database) as accounts:
        account = accounts.change(name, who=_who(), quotas=changed, weight=weight, role=role)
    facts = {"user": account.user, "role": account.role, "weight": account.weight}
    if is_json:
        print_json({**facts, "quotas": vars(account.quotas)})
        return
    print(f"{name}: role {account.role}, weight {account.weight:g}")
    for limit, value in vars(account.quotas).items():
        print(f"  {limit}: {'no limit' if value is None else f'{value:g}'}")


@app.command()
def inputs(
    name: Name,
    allow: Annotated[list[str] | None, typer.Option(help="A folder or URI to add.")] = None,
    forbid: Annotated[list[str] | None, typer.Option(help="One to take away.")] = None,
    database: DatabaseUrl = None,
) -> None:
    """Where a user's batch jobs may read from; without options, show it."""
    with _accounts(database) as accounts:
        for prefix in allow or []:
            accounts.allow_input(name, prefix, who=_who())
        for prefix in forbid or []:
            accounts.forbid_input(name, prefix, who=_who())
        allowed = accounts.allowed_inputs(name)
    for prefix in allowed:
        print(prefix)
    if not allowed:
        print(f"{name} may read uploads alone")


@app.command()
def audit(
    most: Annotated[int, typer.Option(help="Lines to show, the newest.", min=1)] = 50,
    database: DatabaseUrl = None,
    is_json: Json = False,
) -> None:
    """Who changed what, oldest first."""
    with _accounts(database) as accounts:
        lines = accounts.audit_lines(most)
    if is_json:
        print_json({"audit": [vars(line) for line in lines]})
        return
    for line in lines:
        print(f"{_time(line.at)}  {line.who}  {line.action} {line.subject}  {line.detail}")


@contextmanager
def _accounts(url: str | None) -> "Iterator[Accounts]":
    from registry.database import Database
    from serving.accounts import Accounts

    database = Database(url)
    try:
        yield Accounts(database)
    finally:
        database.close()


def _who() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def _limits(texts: list[str] | None) -> dict[str, Any]:
    limits: dict[str, float | None] = {}
    for text in texts or []:
        name, _, value = text.partition("=")
        if name not in _QUOTAS:
            raise UserError(
                f"received the quota {text!r}; {', '.join(_QUOTAS)} with a number are allowed, "
                f"such as rows_per_day=1000000.{did_you_mean(name, _QUOTAS)}"
            )
        try:
            number = None if value == "none" else float(value)
        except ValueError:
            raise UserError(
                f"received {text!r}; {name}=NUMBER or {name}=none is allowed."
            ) from None
        is_whole = name != "requests_per_s" and number is not None
        limits[name] = int(number) if is_whole and number is not None else number
    return limits


def _show_key(name: str, key: str, is_json: bool) -> None:
    if is_json:
        print_json({"user": name, "key": key})
        return
    print(f"{name}: {key}")
    print("It is shown this once. As a header: Authorization: Bearer KEY")


def _record(record: "UserRecord") -> dict[str, Any]:
    account = record.account
    return {
        "user": account.user,
        "role": account.role,
        "weight": account.weight,
        "quotas": vars(account.quotas),
        "granted": sorted(account.granted),
        "rows_today": record.rows_today,
        "created_at": record.created_at,
        "inputs": list(record.inputs),
        "keys": [{"id": key, "expires_at": end} for key, end in record.keys],
    }


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
