"""What is registered: rows as records, and the words for what is not there.

Every function works inside a transaction of its caller's, and raises RegistryError for what does
not exist, with the nearest that does.
"""

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from configs.errors import did_you_mean
from registry import aliases
from registry.errors import RegistryError
from registry.records import ModelSummary, Version
from registry.references import CHAMPION, Reference
from registry.tables import ALIASES, DELETED, MODELS, READY, VERSIONS

_NEAREST = 5
_SHOWN = 8


def all_models(connection: sa.Connection) -> list[ModelSummary]:
    """All models, by name."""
    held: dict[str, dict[str, int]] = {}
    query = sa.select(ALIASES).order_by(ALIASES.c.name, ALIASES.c.alias)
    for row in connection.execute(query).mappings():
        held.setdefault(row["name"], {})[row["alias"]] = row["number"]
    is_ready = (VERSIONS.c.name == MODELS.c.name) & (VERSIONS.c.state == READY)
    counted = (
        sa.select(
            MODELS.c.name,
            sa.func.count(VERSIONS.c.number).label("versions"),
            sa.func.coalesce(sa.func.max(VERSIONS.c.number), 0).label("newest"),
        )
        .select_from(MODELS.outerjoin(VERSIONS, is_ready))
        .group_by(MODELS.c.name)
    )
    rows = connection.execute(counted).mappings()
    summaries = [ModelSummary(**row, aliases=held.get(row["name"], {})) for row in rows]
    return sorted(summaries, key=lambda summary: summary.name)  # the same order on all databases


def all_versions(connection: sa.Connection, name: str) -> list[Version]:
    """All versions of a model, the oldest first, deleted ones too."""
    check_model(connection, name)
    query = sa.select(VERSIONS).where(VERSIONS.c.name == name).order_by(VERSIONS.c.number)
    rows = connection.execute(query).mappings().all()
    held = _held(connection, name)
    return [_record(row, held) for row in rows]


def find(connection: sa.Connection, name: str, number: int) -> Version:
    """One version, ready or deleted."""
    query = sa.select(VERSIONS).where(VERSIONS.c.name == name, VERSIONS.c.number == number)
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        check_model(connection, name)
        raise _no_version(connection, name, number)
    return _record(row, _held(connection, name))


def keyed(connection: sa.Connection, name: str, key: str, digest: str | None) -> Version | None:
    """The version that was registered with a key, or None.

    Raises:
        RegistryError: It has another digest than the one given.
    """
    query = sa.select(VERSIONS).where(VERSIONS.c.name == name, VERSIONS.c.key == key)
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        return None
    if digest not in (None, row["digest"]):
        raise RegistryError(
            f"the key {key!r} of {name} belongs to {name}/{row['number']}, another artifact "
            f"(digest {row['digest'][:12]}, not {str(digest)[:12]}). Use another key."
        )
    return _record(row, _held(connection, name))


def pointed_to(connection: sa.Connection, wanted: Reference) -> int:
    """Number of the version that a reference means."""
    if wanted.number is not None:
        return wanted.number
    alias = wanted.alias or CHAMPION
    number = aliases.current(connection, wanted.name, alias)
    if number is None:
        check_model(connection, wanted.name)
        raise no_alias(connection, wanted.name, alias)
    return number


def check_model(connection: sa.Connection, name: str) -> None:
    """Whether there is a model of this name."""
    query = sa.select(MODELS.c.name)
    if connection.execute(query.where(MODELS.c.name == name)).scalar() is not None:
        return
    names = sorted(connection.execute(query).scalars())
    there = f"{_listed(names)} are there" if names else "there is none yet"
    raise RegistryError(
        f"no model {name!r} is registered; {there}.{did_you_mean(name, names)} See `lockstep "
        "models list`."
    )


def check_ready(version: Version) -> None:
    """Whether a version still has its files."""
    if version.state == DELETED:
        raise _was_deleted(version.name, version.number)


def check_usable(connection: sa.Connection, name: str, number: int) -> None:
    """Whether there is such a version with its files, by one statement where there is."""
    query = sa.select(VERSIONS.c.state).where(VERSIONS.c.name == name, VERSIONS.c.number == number)
    state = connection.execute(query).scalar()
    if state is None:
        check_model(connection, name)
        raise _no_version(connection, name, number)
    if state == DELETED:
        raise _was_deleted(name, number)


def no_alias(connection: sa.Connection, name: str, alias: str) -> RegistryError:
    """That a model has no such alias."""
    query = sa.select(ALIASES.c.alias).where(ALIASES.c.name == name)
    there = sorted(connection.execute(query).scalars())
    return RegistryError(
        f"{name} has no alias {alias!r}; {_listed(there) or 'none'} is there."
        f"{did_you_mean(alias, there)} Point it to a version: `lockstep models promote "
        f"{name}/NUMBER --alias {alias}`."
    )


def next_number(connection: sa.Connection, name: str, now: float) -> int:
    """What the next version of a model is called, within the writer's transaction.

    The model is made where it is new.
    """
    is_known = sa.select(MODELS.c.name).where(MODELS.c.name == name)
    if connection.execute(is_known).scalar() is None:
        connection.execute(MODELS.insert().values(name=name, created_at=now))
        return 1
    newest = sa.select(sa.func.max(VERSIONS.c.number)).where(VERSIONS.c.name == name)
    return int(connection.execute(newest).scalar() or 0) + 1


def _was_deleted(name: str, number: int) -> RegistryError:
    return RegistryError(
        f"{name}/{number} was deleted; its record is all that is left. Name another version: see "
        f"`lockstep models show {name}`."
    )


def _no_version(connection: sa.Connection, name: str, number: int) -> RegistryError:
    query = sa.select(VERSIONS.c.number).where(VERSIONS.c.name == name, VERSIONS.c.state == READY)
    there = sorted(connection.execute(query).scalars(), key=lambda other: abs(other - number))
    near = ", ".join(map(str, sorted(there[:_NEAREST])))
    state = f"of its {len(there)} the nearest are {near}" if there else "all were deleted"
    return RegistryError(
        f"{name} has no version {number}; {state}. See `lockstep models show {name}`."
    )


def _record(row: sa.RowMapping, held: Mapping[int, Sequence[str]]) -> Version:
    return Version(**row, aliases=tuple(held.get(row["number"], ())))


def _held(connection: sa.Connection, name: str) -> dict[int, list[str]]:
    """Aliases by the version they point to."""
    held: dict[int, list[str]] = {}
    for row in connection.execute(sa.select(ALIASES).where(ALIASES.c.name == name)).mappings():
        held.setdefault(row["number"], []).append(row["alias"])
    return {number: sorted(names) for number, names in held.items()}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" and more" if len(names) > _SHOWN else "")
