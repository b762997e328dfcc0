"""Runs of Lockstep that `benchmarks.recovery` times.

Run as `python -m benchmarks.recovery_lockstep PROGRAM JSON` in the project's folder. Each prints
what it found as JSON on its last line.
"""

import contextlib
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.recovery_kills import Killer, kill_host, kill_process, plan_blows
from lockstep.follow import Interrupted, SilentListener

_MANY = 1_000_000
_WARM_UP_STEPS = 8
_SHARING = 4  # steps after a checkpoint during which it is certainly on its way


def main() -> None:
    """Run one program and print what it found."""
    options = json.loads(sys.argv[2])
    programs = {"kills": run_kills, "speed": run_speed, "blocked": run_blocked}
    print(json.dumps(programs[sys.argv[1]](options)))


def run_kills(options: dict[str, Any]) -> dict[str, Any]:
    """A training that is killed again and again.

    Options: `job` and `overrides`; `victim` ("process" or "host"), `kills`, `pauses_s` (least and
    most between recovery and the next kill), `seed`, `cpus` that Ray may use.
    """
    import ray

    from cluster.runtime import on_loopback
    from lockstep.api import train

    # A Ray of our own: the embedded one has no room for spare hosts.
    with on_loopback():
        ray.init(
            address="local",
            num_cpus=options["cpus"],
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    least_s, most_s = options["pauses_s"]
    blows = plan_blows(options["kills"], 2, (least_s, most_s), options["seed"])
    killer = Killer(blows, kill_host if options["victim"] == "host" else kill_process)
    overrides = [
        *options["overrides"],
        f"train.epochs={_MANY}",
        f"cluster.max_failures={_MANY}",
    ]
    begin_s = time.time()
    with contextlib.suppress(Interrupted):
        train(options["job"], overrides=overrides, listener=killer)
    return {**killer.outcome.as_json(), "begin_s": begin_s, "end_s": time.time()}


def run_speed(options: dict[str, Any]) -> dict[str, Any]:
    """Steps a second of whole epochs, without the first one. Options: `job`, `overrides`."""
    from lockstep.api import train

    run = train(options["job"], overrides=options["overrides"])
    epochs = _json_lines(run.folder / "metrics.jsonl")
    events = _json_lines(run.folder / "events.jsonl")
    steps = [b["step"] - a["step"] for a, b in itertools.pairwise(epochs)]
    rates = [count / epoch["epoch_s"] for count, epoch in zip(steps, epochs[1:], strict=True)]
    checkpoints = [event["time"] for event in events if event["event"] == "checkpoint"]
    return {
        "steps_per_s": statistics.median(rates),
        "checkpoints": len(checkpoints),
        "begin_s": checkpoints[0],
        "end_s": checkpoints[-1],
    }


class Stopwatch(SilentListener):
    """Ends a run, as Ctrl-C does, after so many steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def event(self, event: dict[str, Any]) -> None:
        """A live event of the run."""
        if event["event"] == "progress" and event["step"] >= self._steps:
            raise KeyboardInterrupt


def run_blocked(options: dict[str, Any]) -> dict[str, Any]:
    """How long steps take around checkpoints of a large model.

    A callback of the job notes when each step is complete. Options: `job`, `overrides`,
    `every_steps`, `checkpoints`, `times` (the callback's file).
    """
    from lockstep.api import train

    every, count = options["every_steps"], options["checkpoints"]
    last = every * (count + 1)
    begin_s = time.time()
    with contextlib.suppress(Interrupted):
        train(options["job"], overrides=options["overrides"], listener=Stopwatch(last))
    times = [float(line) for line in Path(options["times"]).read_text().split()]
    return {
        **blocked(times, every, count),
        "begin_s": begin_s,
        "end_s": time.time(),
    }


def blocked(times_s: list[float], every: int, count: int) -> dict[str, Any]:
    """What a checkpoint after each `every` steps cost the step after it.

    While a checkpoint is sent and written, steps share the machine with that and are slower. What
    the step after it is longer than those, is the time for which training stood still.

    Args:
        times_s: When each step was complete.
        every: Steps between checkpoints.
        count: How many checkpoints to look at.

    Returns:
        `step_s` of the median step; for each checkpoint `after_s`, by how much the step after it is
        longer than that, and `blocked_s`, than the median of the steps that follow.
    """
    gaps = [b - a for a, b in itertools.pairwise(times_s)]  # gaps[i]: from step i+1 to step i+2
    median_s = statistics.median(gaps[_WARM_UP_STEPS:])
    after, standstill = [], []
    for number in range(1, count + 1):
        first = every * number - 1
        after.append(gaps[first] - median_s)
        standstill.append(gaps[first] - statistics.median(gaps[first + 1 : first + 1 + _SHARING]))
    return {"step_s": median_s, "after_s": after, "blocked_s": standstill}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
