"""Engine B from outside: a gang of hosts that forms a group for each number of workers.

Cases share a group as long as none fails: forming one and importing are what costs. A case that
fails or takes too long ends its group; the others go on in a new one.
"""

import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.errors import GangFailure
from cluster.gang import Gang, GangSpec
from tests.contract.parity.engines import Outcome, Prepared

CASE_TIMEOUT_S = 120.0
_ENTRY = "tests.contract.parity.rank:main"


class Pool:
    """Hosts for up to `workers` workers; needs a running Ray."""

    def __init__(self, workers: int, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._generation = 0
        environment = {
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "1",
            "TF_GRPC_REUSE_PORT": "1",
            "PYTHONUNBUFFERED": "1",
        }
        preload = ("trainer.worker", "tests.contract.parity.rank")
        name = f"parity-{secrets.token_hex(4)}"
        spec = GangSpec(name, workers, 1, 0, preload, environment, str(log_dir), 120.0)
        self._gang = Gang(spec)
        self._gang.place()

    def run(
        self, workers: int, devices: int, cases: Sequence[tuple[str, Prepared, str | None]]
    ) -> dict[str, Outcome | str]:
        """Outcomes by key; where a case failed, what it said."""
        found: dict[str, Outcome | str] = {}
        while left := [entry for entry in cases if entry[0] not in found]:
            begun = [left[0][0]]
            try:
                self._run_group(workers, devices, left, found, begun)
            except GangFailure as error:
                found[begun[-1]] = f"{error}\n(see {self._log_dir})"
                self._gang.kill()
        return found

    def close(self) -> None:
        """End all processes."""
        self._gang.close()

    def _run_group(
        self,
        workers: int,
        devices: int,
        cases: Sequence[Any],
        found: dict[str, Outcome | str],
        begun: list[str],
    ) -> None:
        self._generation += 1
        self._gang.form(self._generation, workers, _ENTRY, (devices, cases))
        finished, left = set(), set()
        since = time.monotonic()
        for message in self._gang.messages():
            if time.monotonic() - since > CASE_TIMEOUT_S:
                raise GangFailure(f"{begun[-1]} took more than {CASE_TIMEOUT_S:g} s.", "stalled")
            if message is None:
                continue
            if message.kind == "begin" and message.rank == 0:
                begun.append(message.body)
                since = time.monotonic()
            elif message.kind == "outcome":
                found[message.body[0]] = message.body[1]
            elif message.kind == "exception":
                raise GangFailure(message.body["error"], "exception", message.rank)
            elif message.kind == "finished":
                finished.add(message.rank)
                if len(finished) == workers:
                    self._gang.send("leave")
            elif message.kind == "exited":
                if message.rank not in finished:
                    raise GangFailure(f"rank {message.rank} ended: {message.body}", "exited")
                left.add(message.rank)
                if len(left) == workers:
                    return
