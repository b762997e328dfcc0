"""The registry: names, immutable versions, aliases, and where each version comes from.

Owns the order of things that makes a version appear whole or not at all. Files come first: a folder
is claimed in the database, written under a name of its own, committed; then one transaction turns
the claim into a version. Whatever dies when, there is either the version or a claim without an
owner, whose folder the next `register` or `delete` removes. Who lost the claim in the meantime (a
process that was suspended for a quarter of an hour) is refused by that same transaction.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from configs.stores import is_remote
from registry import aliases, artifacts, claims, lookup
from registry.aliases import ANY, Expected
from registry.database import Database, home
from registry.errors import AliasConflict, ArtifactFailure, RegistryError
from registry.places import place_of
from registry.records import AliasMove, ModelSummary, Version
from registry.references import CHAMPION, check_alias, check_key, check_name, parse_reference
from registry.tables import COMPONENT, DELETED, READY, VERSIONS

__all__ = ["ANY", "AliasConflict", "AliasMove", "ModelSummary", "Registry", "Version"]


class Registry:
    """All models of one database. Safe to share between threads, and between processes.

    Every change is one transaction; readers never wait. Names, versions and aliases that are not
    there raise RegistryError with the nearest that is. All methods raise DatabaseFailure where the
    database fails.

    Args:
        database: Where records are.
        artifacts: Folder or URI below which new versions are stored. None: what LOCKSTEP_ARTIFACTS
            says, else `artifacts` below LOCKSTEP_HOME.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        database: Database,
        artifacts: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._root = _absolute(artifacts)
        self._clock = clock
        self._claims = claims.Claims(database, clock)
        self._is_prepared = False

    def prepare(self) -> None:
        """Connect, and make the tables where there are none. All other methods do it themselves."""
        if not self._is_prepared:
            self._database.prepare(COMPONENT)
            self._is_prepared = True

    def register(
        self,
        name: str,
        artifact_folder: str | Path,
        *,
        lineage: Mapping[str, Any] | None = None,
        description: str = "",
        tags: Mapping[str, str] | None = None,
        parent: int | None = None,
        key: str | None = None,
    ) -> Version:
        """Copy an artifact and make it the next version of a model.

        Args:
            name: The model; made where it is new.
            artifact_folder: A local artifact folder.
            lineage: Where it comes from; None: what its manifest says. `metrics` in it are the
                version's.
            description: For people.
            tags: For people and programs.
            parent: Number of the version that it was trained from.
            key: Makes this happen once: where a version of this key exists, that one is returned,
                even if it was deleted since.

        Raises:
            RegistryError: The name, the folder, or the parent; or the key belongs to another
                artifact.
            ArtifactFailure: Storage failed; nothing was registered.
        """
        check_name(name)
        if key is not None:
            check_key(key)
        folder = Path(artifact_folder).absolute()
        manifest = artifacts.read_manifest(folder)
        self.prepare()
        with self._database.reading() as connection:
            existing = _same(connection, name, key, manifest.digest)
            if parent is not None:
                lookup.find(connection, name, parent)
        if existing is not None:
            return existing
        self._claims.clean()
        origin = dict(manifest.lineage if lineage is None else lineage)
        draft = Version(
            name=name,
            number=0,
            digest=manifest.digest,
            artifact=f"{self._root}/{name}/{manifest.digest[:16]}-{secrets.token_hex(6)}",
            state=READY,
            created_at=0.0,
            description=description,
            tags=dict(tags or {}),
            lineage=origin,
            metrics=dict(origin.get("metrics") or {}),
            parent=parent,
            key=key,
            manifest_sha256=manifest.sha256,
        )
        return self._stored(draft, folder, manifest)

    def models(self) -> list[ModelSummary]:
        """All models, by name."""
        self.prepare()
        with self._database.reading() as connection:
            return lookup.all_models(connection)

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, the oldest first, those that were deleted too."""
        self.prepare()
        with self._database.reading() as connection:
            return lookup.all_versions(connection, name)

    def version(self, name: str, number: int) -> Version:
        """One version, also if it was deleted."""
        self.prepare()
        with self._database.reading() as connection:
            return lookup.find(connection, name, number)

    def keyed(self, name: str, key: str) -> Version | None:
        """The version that was registered with a key, or None."""
        self.prepare()
        with self._database.reading() as connection:
            return lookup.keyed(connection, name, key, None)

    def resolve(self, reference: str) -> Version:
        """The version that `name/3`, `name@alias` or `name` (its champion) stands for.

        Raises:
            RegistryError: There is none, or it was deleted.
        """
        wanted = parse_reference(reference)
        self.prepare()
        with self._database.reading() as connection:
            number = lookup.pointed_to(connection, wanted)
            version = lookup.find(connection, wanted.name, number)
        lookup.check_ready(version)
        return version

    def set_alias(
        self,
        name: str,
        alias: str,
        number: int | None,
        *,
        who: str,
        why: str,
        expected: Expected = ANY,
        guard: Callable[[sa.Connection], None] | None = None,
    ) -> AliasMove:
        """Point an alias to a version, at once for all who look; None takes the alias away.

        Where the alias points there already, nothing is recorded and its last move is returned.

        Args:
            name: The model.
            alias: Such as `champion`.
            number: The version.
            who: Such as user@host; kept.
            why: For people; kept.
            expected: What the alias must point to now; None: it must not exist yet.
            guard: Is called in the transaction, before anything changes: where it raises, nothing
                does; what it writes is kept with the move, or not at all.

        Raises:
            AliasConflict: It points elsewhere than expected; nothing was changed.
            RegistryError: There is no such version, or it was deleted.
        """
        check_alias(alias)
        self.prepare()
        with self._database.writing(COMPONENT.name) as connection:
            now = aliases.current(connection, name, alias)
            if number is not None:
                lookup.check_usable(connection, name, number)
            elif now is None:
                lookup.check_model(connection, name)
                raise lookup.no_alias(connection, name, alias)
            aliases.check_expected(name, alias, now, expected)
            if guard is not None:
                guard(connection)
            if number == now:
                return aliases.last_move(connection, name, alias)
            wanted = AliasMove(name, alias, now, number, self._clock(), who, why, 0)
            return aliases.move(connection, wanted)

    def rollback(self, name: str, *, alias: str = CHAMPION, who: str, why: str) -> AliasMove:
        """Point an alias back to what it pointed to before; again goes back one more.

        Versions that were deleted since are passed over. An alias that was taken away comes back.

        Raises:
            RegistryError: There is nothing earlier.
        """
        self.prepare()
        with self._database.writing(COMPONENT.name) as connection:
            moves = aliases.history(connection, name, alias)
            if not moves:
                lookup.check_model(connection, name)
                raise lookup.no_alias(connection, name, alias)
            now = aliases.current(connection, name, alias)
            for number in aliases.earlier(moves):
                if lookup.find(connection, name, number).state == READY:
                    break
            else:
                raise aliases.nothing_earlier(name, alias, now)
            wanted = AliasMove(name, alias, now, number, self._clock(), who, why, 0, "rollback")
            return aliases.move(connection, wanted)

    def history(self, name: str, alias: str | None = None) -> list[AliasMove]:
        """All moves of a model's aliases, or of one of them, the oldest first."""
        self.prepare()
        with self._database.reading() as connection:
            lookup.check_model(connection, name)
            return aliases.history(connection, name, alias)

    def annotate(
        self,
        name: str,
        number: int,
        *,
        description: str | None = None,
        tags: Mapping[str, str | None] | None = None,
    ) -> Version:
        """Change a version's description, and set tags (None takes one away); None: as it is."""
        self.prepare()
        with self._database.writing(COMPONENT.name) as connection:
            version = lookup.find(connection, name, number)
            merged = {**version.tags, **(tags or {})}
            connection.execute(
                _row_of(VERSIONS.update(), name, number).values(
                    description=version.description if description is None else description,
                    tags={tag: value for tag, value in merged.items() if value is not None},
                )
            )
            return lookup.find(connection, name, number)

    def delete(self, name: str, number: int) -> None:
        """Delete a version's files; its record stays. Deleting again changes nothing.

        Raises:
            RegistryError: An alias holds it.
            ArtifactFailure: It was deleted, but storage failed; the files go with the next
                `register` or `delete`.
        """
        self.prepare()
        with self._database.writing(COMPONENT.name) as connection:
            version = lookup.find(connection, name, number)
            if version.aliases:
                raise RegistryError(
                    f"{version} is held by {', '.join(version.aliases)}; a version without an "
                    "alias can be deleted. Point the alias elsewhere first: `lockstep models "
                    f"promote {name}/NUMBER --alias {version.aliases[0]}`."
                )
            if version.state == READY:
                connection.execute(_row_of(VERSIONS.update(), name, number).values(state=DELETED))
                self._claims.give_up(connection, version.artifact)
        if version.state == READY:
            self._claims.discard(place_of(version.artifact))
        self._claims.clean()
        if self._claims.is_left(version.artifact):
            raise ArtifactFailure(
                f"{version} is deleted, but its files at {version.artifact} could not be removed. "
                "They go with the next version that is registered or deleted; check the storage."
            )

    def verify(self, version: Version) -> list[str]:
        """What is wrong with the files of a version, all of them hashed; empty: intact.

        Raises:
            ArtifactFailure: Storage does not answer.
        """
        if version.state == DELETED:
            return ["it was deleted"]
        place = place_of(version.artifact)
        return artifacts.damage(place, version.digest, version.manifest_sha256)

    def require_intact(self, version: Version) -> None:
        """Refuse a version whose files are not what was registered, all of them hashed.

        Raises:
            ArtifactFailure: They differ, or storage does not answer.
        """
        wrong = self.verify(version)
        if wrong:
            raise ArtifactFailure(
                f"{version} is not what was registered: {'; '.join(wrong[:5])} in "
                f"{version.artifact}. Nothing was promoted; restore the files from a copy, or "
                "promote another version."
            )

    def fetch(self, version: Version) -> Path:
        """A local folder with the artifact, every file checked; not to be written to.

        Artifacts of a store are kept in `cache/artifacts` below LOCKSTEP_HOME.

        Raises:
            RegistryError: It was deleted.
            ArtifactFailure: It cannot be read, or is not what was registered.
        """
        lookup.check_ready(version)
        place = place_of(version.artifact)
        if is_remote(version.artifact):
            cache = home() / "cache" / "artifacts"
            return artifacts.cached(place, version.digest, version.manifest_sha256, cache)
        wrong = self.verify(version)
        if wrong:
            raise ArtifactFailure(
                f"{version} is not what was registered: {'; '.join(wrong[:5])} in "
                f"{version.artifact}. Restore the files from a copy, or use another version."
            )
        return Path(place.name)

    def _stored(self, draft: Version, folder: Path, manifest: artifacts.Manifest) -> Version:
        """Copy the files and insert the version; or the one that has its key by then."""
        place = place_of(draft.artifact)
        with self._claims.writing(place) as claim:
            size_bytes = artifacts.store(folder, manifest, place, claim.renew)
            with self._database.writing(COMPONENT.name) as connection:
                existing = _same(connection, draft.name, draft.key, draft.digest)
                if existing is not None:
                    return existing  # another process was faster; the claim goes with its folder
                claim.turn_into_version(connection)
                now = self._clock()
                number = lookup.next_number(connection, draft.name, now)
                version = replace(draft, number=number, created_at=now, size_bytes=size_bytes)
                row = {column.name: vars(version)[column.name] for column in VERSIONS.columns}
                connection.execute(VERSIONS.insert().values(**row))
        return version


def _absolute(root: str | None) -> str:
    root = root or artifacts.default_artifacts()
    if is_remote(root):
        place_of(root)  # tells a mistake before anything is done
        return root.rstrip("/")
    return str(Path(root.removeprefix("file://")).absolute())


def _same(connection: sa.Connection, name: str, key: str | None, digest: str) -> Version | None:
    return None if key is None else lookup.keyed(connection, name, key, digest)


def _row_of(statement: sa.Update, name: str, number: int) -> sa.Update:
    return statement.where(VERSIONS.c.name == name, VERSIONS.c.number == number)
