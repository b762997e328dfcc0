"""A started run as its driver sees it: events, the result, and whether the coordinator is there."""

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.coordinator import Coordinator, RunSpec
from cluster.errors import CoordinatorLost
from cluster.gang import release

_ANSWER_S = 30.0  # longer than a coordinator is ever busy
_UNREACHABLE_S = 3.0  # a connection that broke is there again by then, or its end is known


class RunHandle:
    """A started run as its driver sees it."""

    def __init__(self, spec: RunSpec) -> None:
        # Where the driver is: the loss of a worker's node then is not the coordinator's as well.
        here = ray.get_runtime_context().get_node_id()
        actor = ray.remote(Coordinator).options(
            num_cpus=0,
            max_concurrency=8,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
        )
        self._actor = actor.remote(spec)
        self._result = self._actor.run.remote()
        self._name = spec.gang.name
        self._next_event = 0

    def events(self, timeout_s: float) -> list[dict[str, Any]]:
        """Events since the last call; waits for the first one.

        Raises:
            CoordinatorLost: Its process has ended, or has not been in reach for a while. A
                connection that only broke is made anew.
        """
        cut_at: float | None = None
        while True:
            wait_s, allowed_s = (
                (timeout_s, timeout_s + _ANSWER_S) if not cut_at else (0, _UNREACHABLE_S)
            )
            asked = self._actor.events.remote(self._next_event, wait_s)
            try:
                self._next_event, news = ray.get(asked, timeout=allowed_s)
                return list(news)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                is_cut = isinstance(error, ray.exceptions.ActorUnavailableError)
                cut_at = cut_at or time.monotonic()
                if not is_cut or time.monotonic() - cut_at > _UNREACHABLE_S:
                    self.kill()  # one that only hangs would hold the run folder
                    raise _coordinator_lost(error) from error
                time.sleep(0.1)

    def is_finished(self) -> bool:
        """Whether `result` returns at once."""
        if not ray.wait([self._result], timeout=0)[0]:
            return False
        try:
            ray.get(self._result)
        except ray.exceptions.ActorUnavailableError:  # cut off, which says nothing of the run
            self._result = self._actor.run.remote()
            return False
        except ray.exceptions.RayError:
            return True  # for `result` to raise
        return True

    def request_stop(self, reason: str) -> None:
        """Ask for a clean stop."""
        self._actor.request_stop.remote(reason)

    def result(self) -> Any:
        """The delegate's result; blocks. Raises what the coordinator raised."""
        try:
            return ray.get(self._result)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if cause is not None:
                raise cause from None
            raise
        except ray.exceptions.RayActorError as error:
            release(self._name)
            raise _coordinator_lost(error) from error

    def kill(self) -> None:
        """End the coordinator at once; hosts follow, and what they held is given back."""
        ray.kill(self._actor)
        release(self._name)


def _coordinator_lost(error: Exception) -> CoordinatorLost:
    return CoordinatorLost(
        f"the coordinator was lost: {type(error).__name__}. Its node or its Ray has ended; "
        "--resume goes on from the newest checkpoint."
    )
