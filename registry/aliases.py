"""Aliases and their history: inside a transaction of the only writer, one row moved, one appended.

Moves of a model are numbered 1, 2, 3 ... without gaps. The history of an alias, replayed, is where
the alias points: a "set" puts a version on top, a "rollback" takes versions off down to the one it
went back to. So rolling back twice goes back two promotions.
"""

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import Final, Literal

import sqlalchemy as sa

from registry.errors import AliasConflict, RegistryError
from registry.records import AliasMove
from registry.tables import ALIASES, MOVES


class Anything(Enum):
    """The type of `ANY`."""

    ANY = "any"


ANY: Final = Anything.ANY
"""As what an alias is expected to point to: whatever it does, or nothing."""

Expected = int | None | Literal[Anything.ANY]


def current(connection: sa.Connection, name: str, alias: str) -> int | None:
    """What an alias points to; None where it does not exist."""
    return connection.execute(
        sa.select(ALIASES.c.number).where(ALIASES.c.name == name, ALIASES.c.alias == alias)
    ).scalar()


def check_expected(name: str, alias: str, found: int | None, expected: Expected) -> None:
    """Raises AliasConflict unless an alias points to what was expected."""
    if expected is ANY or found == expected:
        return
    raise AliasConflict(
        f"{name}@{alias} was expected to {_pointing(expected)} and does "
        f"{_pointing(found) if found is not None else 'not exist'}: somebody moved it in the "
        "meantime. Look at `lockstep models show`, and decide anew."
    )


def move(connection: sa.Connection, wanted: AliasMove) -> AliasMove:
    """Point an alias elsewhere and record it; `sequence` of `wanted` is not looked at."""
    row = (ALIASES.c.name == wanted.name) & (ALIASES.c.alias == wanted.alias)
    if wanted.to_number is None:
        connection.execute(ALIASES.delete().where(row))
    elif wanted.from_number is None:
        connection.execute(
            ALIASES.insert().values(name=wanted.name, alias=wanted.alias, number=wanted.to_number)
        )
    else:
        connection.execute(ALIASES.update().where(row).values(number=wanted.to_number))
    newest = sa.select(sa.func.coalesce(sa.func.max(MOVES.c.sequence), 0) + 1)
    following = newest.where(MOVES.c.name == wanted.name).scalar_subquery()
    recorded = MOVES.insert().values(**{**vars(wanted), "sequence": following})
    sequence = connection.execute(recorded.returning(MOVES.c.sequence)).scalar_one()
    return replace(wanted, sequence=sequence)


def history(connection: sa.Connection, name: str, alias: str | None = None) -> list[AliasMove]:
    """All moves of a model, or of one of its aliases, the oldest first."""
    query = sa.select(MOVES).where(MOVES.c.name == name).order_by(MOVES.c.sequence)
    if alias is not None:
        query = query.where(MOVES.c.alias == alias)
    return [AliasMove(**row) for row in connection.execute(query).mappings()]


def last_move(connection: sa.Connection, name: str, alias: str) -> AliasMove:
    """The newest move of an alias that exists."""
    query = sa.select(MOVES).where(MOVES.c.name == name, MOVES.c.alias == alias)
    newest = query.order_by(MOVES.c.sequence.desc()).limit(1)
    return AliasMove(**connection.execute(newest).mappings().one())


def earlier(moves: Sequence[AliasMove]) -> list[int]:
    """What an alias can be rolled back to, the last one first.

    Args:
        moves: The history of one alias.
    """
    stack: list[int | None] = []
    for made in moves:
        if made.kind == "rollback":
            while stack and stack[-1] != made.to_number:
                stack.pop()
        else:
            stack.append(made.to_number)
    now = stack[-1] if stack else None
    return [number for number in reversed(stack[:-1]) if number is not None and number != now]


def nothing_earlier(name: str, alias: str, now: int | None) -> RegistryError:
    """Why there is nothing to roll back to."""
    state = f"points to {name}/{now}" if now is not None else "does not exist"
    return RegistryError(
        f"{name}@{alias} {state}, and no earlier version of it is left to roll back to. Name the "
        f"version: `lockstep models promote {name}/NUMBER --alias {alias}`."
    )


def _pointing(number: Expected) -> str:
    return "not exist yet" if number is None else f"point to version {number}"
