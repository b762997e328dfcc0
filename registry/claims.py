"""Claims on folders: whose the files are that belong to no version, and when they may go.

A claim is a row of `model_folders`: a folder that is being written, or one that is to be removed.
It is its owner's until the owner's process is gone, as far as that can be told from here, or until
it was not renewed for a quarter of an hour. Then whoever cleans takes it over.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import sqlalchemy as sa

from registry.database import Database
from registry.errors import ArtifactFailure, DatabaseFailure, RegistryError
from registry.owners import is_gone, own_mark
from registry.places import Place, place_of
from registry.tables import COMPONENT, FOLDERS, GARBAGE, VERSIONS, WRITING

_LEASE_S = 900.0
_RENEW_S = 60.0


class Claims:
    """The claims of one database.

    Args:
        database: Prepared for the component `models` before the first call.
        clock: Seconds since 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    @contextlib.contextmanager
    def writing(self, place: Place) -> Iterator["Claim"]:
        """Claim a new place. Unless the block made it a version's, for good, it is removed."""
        claim = Claim(self._database, place.name, self._clock)
        with self._database.writing(COMPONENT.name) as connection:
            connection.execute(FOLDERS.insert().values(place=place.name, **self._row(WRITING)))
        is_done = False
        try:
            yield claim
            is_done = claim.is_of_version
        finally:
            if not is_done:
                with contextlib.suppress(DatabaseFailure):  # then it is for whoever cleans, later
                    self._abandon(place)

    def give_up(self, connection: sa.Connection, name: str) -> None:
        """Within a transaction: this place is a version's no more; `discard` it afterwards."""
        connection.execute(FOLDERS.insert().values(place=name, **self._row(GARBAGE)))

    def clean(self) -> None:
        """Remove the folders that nobody owns any more. What storage refuses stays for later.

        Raises:
            DatabaseFailure: The database failed.
        """
        with self._database.reading() as connection:
            if not self._orphans(connection):
                return
        with self._database.writing(COMPONENT.name) as connection:
            orphans = self._orphans(connection)
            taken = FOLDERS.update().where(FOLDERS.c.place.in_(orphans))
            connection.execute(taken.values(**self._row(GARBAGE)))
        for name in orphans:
            self.discard(place_of(name))

    def discard(self, place: Place) -> None:
        """Remove a place and the claim on it; where storage fails, leave both to the next."""
        row = FOLDERS.c.place == place.name
        try:
            place.remove()
        except (ArtifactFailure, RegistryError):
            with self._database.writing(COMPONENT.name) as connection:
                released = {"state": GARBAGE, "expires_at": self._clock()}
                connection.execute(FOLDERS.update().where(row).values(**released))
            return
        with self._database.writing(COMPONENT.name) as connection:
            connection.execute(FOLDERS.delete().where(row))

    def is_left(self, name: str) -> bool:
        """Whether a place is still to be removed."""
        with self._database.reading() as connection:
            query = sa.select(FOLDERS.c.place).where(FOLDERS.c.place == name)
            return connection.execute(query).scalar() is not None

    def _orphans(self, connection: sa.Connection) -> list[str]:
        now = self._clock()
        rows = connection.execute(sa.select(FOLDERS)).mappings()
        return [r["place"] for r in rows if r["expires_at"] <= now or is_gone(r["owner"])]

    def _abandon(self, place: Place) -> None:
        """Remove a place unless it is a version's after all.

        Who was cut off while committing does not know. The lock of writers waits for the end of
        that transaction, so that afterwards the tables do.
        """
        with self._database.writing(COMPONENT.name) as connection:
            version = sa.select(VERSIONS.c.number).where(VERSIONS.c.artifact == place.name)
            if connection.execute(version).first() is not None:
                return
            mine = FOLDERS.update().where(FOLDERS.c.place == place.name)
            connection.execute(mine.values(**self._row(GARBAGE)))
        self.discard(place)

    def _row(self, state: str) -> dict[str, str | float]:
        return {"state": state, "owner": own_mark(), "expires_at": self._clock() + _LEASE_S}


class Claim:
    """The claim on a folder that is being written."""

    def __init__(self, database: Database, name: str, clock: Callable[[], float]) -> None:
        self._database = database
        self._mine = (
            (FOLDERS.c.place == name)
            & (FOLDERS.c.state == WRITING)
            & (FOLDERS.c.owner == own_mark())
        )
        self._name = name
        self._clock = clock
        self._renewed_at = clock()
        self.is_of_version = False

    def renew(self) -> None:
        """Say that the owner is at work; often, it costs nothing most of the time.

        Raises:
            ArtifactFailure: The claim was lost.
        """
        now = self._clock()
        if now - self._renewed_at < _RENEW_S:
            return
        with self._database.writing(COMPONENT.name) as connection:
            renewed = FOLDERS.update().where(self._mine).values(expires_at=now + _LEASE_S)
            self._check(connection.execute(renewed).rowcount)
        self._renewed_at = now

    def turn_into_version(self, connection: sa.Connection) -> None:
        """Within the transaction that inserts the version: the folder is the version's.

        Raises:
            ArtifactFailure: The claim was lost, and the folder with it.
        """
        self._check(connection.execute(FOLDERS.delete().where(self._mine)).rowcount)
        self.is_of_version = True

    def _check(self, rows: int) -> None:
        if rows != 1:
            raise ArtifactFailure(
                f"{self._name} was given up on: this process said nothing for {_LEASE_S:g} s, and "
                "another removed what it had written. Try again."
            )
