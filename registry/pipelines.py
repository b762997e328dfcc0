"""The memory of pipelines: their runs, and what each step of a run came to.

A step is recorded once, whole, together with the proof that the run's lease still holds; whoever
goes on with the run starts behind the last recorded step. What steps are, and in which order they
come, is their owner's business: here a result is a JSON object.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from registry.database import Component, Database
from registry.errors import RegistryError
from registry.leases import Lease, Leases

Status = Literal["running", "done", "failed", "abandoned"]
"""running: can be gone on with. The others have ended: decided, given up for a mistake of the
user's, or given up because its pipeline or its data became others."""

Result = dict[str, Any]

_tables = sa.MetaData()
_RUNS = sa.Table(
    "pipeline_runs",
    _tables,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.String(120), nullable=False, unique=True),
    sa.Column("pipeline", sa.String(100), nullable=False, index=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("decision", sa.String(16)),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("ended_at", sa.Double),
    sa.Column("said", sa.Text, nullable=False),
)
_STEPS = sa.Table(
    "pipeline_steps",
    _tables,
    sa.Column("run_id", sa.ForeignKey(_RUNS.c.run_id), primary_key=True),
    sa.Column("step", sa.String(32), primary_key=True),
    sa.Column("result", sa.Text, nullable=False),
    sa.Column("ended_at", sa.Double, nullable=False),
)
_COMPONENT = Component("pipelines", _tables)


@dataclass(frozen=True)
class PipelineRun:
    """One run of a pipeline.

    Attributes:
        run_id: Names it, and its training run.
        pipeline: The pipeline's name.
        digest: Of the pipeline file it was started with.
        status: Whether it has ended, and how.
        decision: What it came to; None before the end.
        started_at: Seconds since 1970.
        ended_at: None before the end.
        said: Why it ended so, a sentence a line.
    """

    run_id: str
    pipeline: str
    digest: str
    status: Status
    decision: str | None
    started_at: float
    ended_at: float | None
    said: str


class PipelineStore:
    """Runs and steps of all pipelines of a database. Safe to share between threads.

    Whatever writes takes the lease of the pipeline, and raises LeaseLost, with nothing written,
    where it went to another process.

    Args:
        database: Where they are kept.
        leases: The leases of the same database.
    """

    def __init__(self, database: Database, leases: Leases) -> None:
        self._database = database
        self._leases = leases
        database.prepare(_COMPONENT)

    def begin(self, lease: Lease, pipeline: str, run_id: str, digest: str, now: float) -> None:
        """Record a new run; nothing where it is recorded already.

        Raises:
            LeaseLost: See the class.
            RegistryError: Another pipeline has a run of this id.
        """
        with self._database.writing(_COMPONENT.name) as connection:
            self._leases.check(connection, lease)
            known = connection.execute(
                sa.select(_RUNS.c.pipeline).where(_RUNS.c.run_id == run_id)
            ).scalar()
            if known is not None and known != pipeline:
                raise RegistryError(
                    f"received the run id {run_id!r} for {pipeline}; {known} has a run of this id. "
                    "Choose another one."
                )
            if known is None:
                connection.execute(
                    _RUNS.insert().values(
                        run_id=run_id,
                        pipeline=pipeline,
                        digest=digest,
                        status="running",
                        started_at=now,
                        said="",
                    )
                )

    def record(self, lease: Lease, run_id: str, step: str, result: Result, now: float) -> None:
        """Record that a step was done, and its result.

        Raises:
            LeaseLost: See the class.
        """
        with self._database.writing(_COMPONENT.name) as connection:
            self.record_within(connection, lease, run_id, step, result, now)

    def record_within(
        self,
        connection: sa.Connection,
        lease: Lease,
        run_id: str,
        step: str,
        result: Result,
        now: float,
    ) -> None:
        """The same inside a transaction of another component: both are kept, or neither.

        Raises:
            LeaseLost: See the class.
        """
        self._leases.check(connection, lease)
        connection.execute(
            _STEPS.insert().values(
                run_id=run_id, step=step, result=json.dumps(result), ended_at=now
            )
        )

    def end(
        self,
        lease: Lease,
        run_id: str,
        status: Status,
        decision: str | None,
        said: str,
        now: float,
    ) -> None:
        """Record that a run has ended; nothing where it is recorded already.

        Raises:
            LeaseLost: See the class.
        """
        with self._database.writing(_COMPONENT.name) as connection:
            self._leases.check(connection, lease)
            connection.execute(
                _RUNS.update()
                .where(_RUNS.c.run_id == run_id, _RUNS.c.status == "running")
                .values(status=status, decision=decision, ended_at=now, said=said)
            )

    def results(self, run_id: str) -> dict[str, Result]:
        """Results of the recorded steps, in the order in which they ended."""
        with self._database.reading() as connection:
            rows = connection.execute(
                sa.select(_STEPS.c.step, _STEPS.c.result)
                .where(_STEPS.c.run_id == run_id)
                .order_by(_STEPS.c.ended_at)
            ).all()
        return {row.step: json.loads(row.result) for row in rows}

    def result(self, run_id: str, step: str) -> Result | None:
        """One of them; None where the step was not done."""
        with self._database.reading() as connection:
            text = connection.execute(
                sa.select(_STEPS.c.result).where(_STEPS.c.run_id == run_id, _STEPS.c.step == step)
            ).scalar()
        return None if text is None else dict(json.loads(text))

    def runs(self, pipeline: str, status: Status | None = None) -> list[PipelineRun]:
        """Runs of a pipeline, the newest first."""
        query = sa.select(_RUNS).where(_RUNS.c.pipeline == pipeline)
        if status is not None:
            query = query.where(_RUNS.c.status == status)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(_RUNS.c.number.desc())).mappings().all()
        return [_run(dict(row)) for row in rows]


def _run(row: Mapping[str, Any]) -> PipelineRun:
    return PipelineRun(**{name: value for name, value in row.items() if name != "number"})
