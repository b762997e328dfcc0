"""What the registry answers with: plain records of models, versions and moves of aliases."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Version:
    """One immutable version of a model.

    Attributes:
        name: The model.
        number: From 1; never used again.
        digest: What `manifest.json` says of all files together.
        artifact: Folder or URI of the stored artifact.
        state: "ready", or "deleted": the files are gone, the record stays.
        created_at: Seconds since 1970.
        description: For people.
        tags: For people and programs.
        lineage: Where it comes from: run, job, code, data.
        metrics: By role (train, validation, test) and metric.
        aliases: What points to it now, sorted.
        parent: Number of the version it was trained from.
        key: Names the act of registering, so that it happens once.
        size_bytes: Of all files together.
        manifest_sha256: Digest of `manifest.json` itself.
    """

    name: str
    number: int
    digest: str
    artifact: str
    state: Literal["ready", "deleted"]
    created_at: float
    description: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    parent: int | None = None
    key: str | None = None
    size_bytes: int = 0
    manifest_sha256: str = ""

    def __str__(self) -> str:
        """The reference that resolves to it, such as `flights/3`."""
        return f"{self.name}/{self.number}"


@dataclass(frozen=True)
class ModelSummary:
    """A model among others.

    Attributes:
        name: The model.
        versions: How many are there, deleted ones not counted.
        newest: Number of the newest of these; 0 where there is none.
        aliases: What each points to.
    """

    name: str
    versions: int
    newest: int
    aliases: dict[str, int]


@dataclass(frozen=True)
class AliasMove:
    """One entry of a model's history.

    Attributes:
        name: The model.
        alias: What was moved.
        from_number: Where it pointed before; None: it did not exist.
        to_number: Where it points from then on; None: it was taken away.
        at: Seconds since 1970.
        who: Such as user@host.
        why: For people.
        sequence: 1, 2, 3 ... within the model.
        kind: "set", or "rollback", which takes the last "set" back.
    """

    name: str
    alias: str
    from_number: int | None
    to_number: int | None
    at: float
    who: str
    why: str
    sequence: int
    kind: Literal["set", "rollback"] = "set"
