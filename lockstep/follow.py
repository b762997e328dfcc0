"""A run as its driver follows it: events, a clean stop on Ctrl-C, successors of coordinators."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from cluster.coordinator import RunSpec
from cluster.errors import CoordinatorLost
from cluster.handle import RunHandle
from cluster.runtime import is_alive
from configs.errors import UserError
from configs.schema import Job
from trainer.files import RecordLog
from trainer.payloads import PlannedData
from trainer.probe import ModelFacts
from trainer.run_folder import RunFolder

_POLL_S = 0.25
_STOP_TIMEOUT_S = 90.0
_COORDINATORS = 4


class Interrupted(UserError):
    """The user stopped the run; a checkpoint is kept."""

    exit_status = 130


@dataclass(frozen=True)
class RunPlan:
    """A run before it starts."""

    job: Job
    folder: RunFolder
    data: PlannedData
    model: ModelFacts


class Listener(Protocol):
    """What is told while a run goes on; all methods may do nothing."""

    def converting(self, role: str, done_bytes: int, all_bytes: int) -> None:
        """Files that are not Parquet are converted; from any thread, one call at a time."""

    def planned(self, plan: RunPlan) -> None:
        """Everything is checked and nothing has started."""

    def warned(self, warning: str) -> None:
        """Something the user should know."""

    def event(self, event: dict[str, Any]) -> None:
        """A live event of the run."""

    def stopping(self) -> None:
        """A stop was asked for."""


class SilentListener:
    """Tells nothing."""

    def converting(self, role: str, done_bytes: int, all_bytes: int) -> None:
        """Ignored."""

    def planned(self, plan: RunPlan) -> None:
        """Ignored."""

    def warned(self, warning: str) -> None:
        """Ignored."""

    def event(self, event: dict[str, Any]) -> None:
        """Ignored."""

    def stopping(self) -> None:
        """Ignored."""


def drain(handle: RunHandle, listener: Listener) -> dict[str, Any]:
    """Pass events on until the run has ended; Ctrl-C asks for a clean stop, twice ends it.

    Returns the delegate's result.
    """
    stop_asked_at: float | None = None
    while True:
        try:
            is_finished = handle.is_finished()
            for event in handle.events(0.0 if is_finished else _POLL_S):
                listener.event(event)
            if is_finished:
                break
            if stop_asked_at is not None and time.monotonic() - stop_asked_at > _STOP_TIMEOUT_S:
                handle.kill()
                raise Interrupted("stopped; the workers did not answer, they were ended.")
        except KeyboardInterrupt:
            if stop_asked_at is not None:
                handle.kill()
                raise Interrupted("ended at once; the newest checkpoint is kept.") from None
            stop_asked_at = time.monotonic()
            listener.stopping()
            handle.request_stop("Ctrl-C")
        except CoordinatorLost as error:
            if stop_asked_at is not None:
                raise Interrupted(f"stopped; {error}") from error
            raise
    result: dict[str, Any] = handle.result()
    return result


def follow(spec: RunSpec, listener: Listener) -> None:
    """Follow a training run to its end; a coordinator that is lost gets a successor.

    The successor goes on from the newest checkpoint on storage, and with what has not happened yet
    of a plan of chaos; its clock begins anew.
    """
    for left in reversed(range(_COORDINATORS)):
        try:
            summary = drain(RunHandle(spec), listener)
            break
        except CoordinatorLost as error:
            if not left or not is_alive():
                raise
            listener.warned(f"{error} Another one goes on.")
            settings = replace(spec.settings, is_resumed=True, lost_at=time.time())
            fired = _fired(Path(settings.run_folder))
            spec = replace(spec, settings=settings, chaos_fired=fired)
    if summary["status"] == "interrupted":
        raise Interrupted(
            f"stopped after step {summary['steps']}; the checkpoint is in {summary['run_folder']}. "
            "Go on with --resume."
            if summary["steps"]
            else "stopped before the first step; there is no checkpoint yet."
        )


def _fired(run_folder: Path) -> tuple[str, ...]:
    """Faults that have fired in a run; ranks that one hits together count once."""
    events = RecordLog(run_folder / "events.jsonl").records()
    fired = {(e["generation"], e["fault"]): e["fault"] for e in events if e["event"] == "chaos"}
    return tuple(fired.values())
