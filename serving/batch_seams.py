"""What the dispatching of batch jobs needs of others, and how it is set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Models(Protocol):
    """What the loop asks of the registry."""

    def version(self, name: str, number: int) -> Any:
        """A version of a model."""

    def fetch(self, version: Any) -> Path:
        """Its artifact as a local folder."""


class Users(Protocol):
    """What the loop asks of the accounts."""

    def account(self, user: str) -> Any:
        """Weight and quotas of a user."""

    def allowed_inputs(self, user: str) -> list[str]:
        """Where the user's files may be."""

    def charge_rows_in(self, connection: Any, user: str, rows: int) -> None:
        """Count rows against the user's quota of the day, in a transaction."""


@dataclass(frozen=True)
class RunnerSettings:
    """How the loop behaves.

    Attributes:
        min_predictors: Kept even where there is nothing to do.
        max_predictors: The most at the same time.
        lease_s: How long the ownership lasts without renewal.
        refresh_s: How often new and cancelled jobs are looked for.
        idle_s: How long more predictors than needed are kept.
        attempts: Failures of one shard, or of one plan, after which the job fails.
        begin_attempts: Failures to take a job up, for want of storage or of its model, after which
            it fails: about seven minutes, as an outage must not end all jobs.
        task_timeout_s: A task that takes longer, and much longer than estimated, is ended. A plan,
            which has no estimate, may take four times as long after each such end.
        sweep_s: How often files are looked for whose time is over.
    """

    min_predictors: int = 0
    max_predictors: int = 1
    lease_s: float = 10.0
    refresh_s: float = 0.25
    idle_s: float = 60.0
    attempts: int = 5
    begin_attempts: int = 20
    task_timeout_s: float = 600.0
    sweep_s: float = 60.0
