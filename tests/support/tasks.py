"""Stand-ins for training, for the process layer's tests: no TensorFlow."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from cluster.channel import Channel, Message
from cluster.coordinator import Stage
from cluster.errors import GangFailure
from cluster.template import Launch
from configs.errors import UserError


def work(channel: Channel, launch: Launch) -> None:
    """Does what `launch.payload` tells this rank in this generation, then finishes."""
    channel.send("ready", {"pid": os.getpid(), "addresses": launch.addresses})
    fault = launch.payload.get((launch.generation, launch.rank))
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "exit":
        os._exit(7)
    elif fault == "raise":
        raise RuntimeError("broken worker")
    elif fault == "user":
        raise UserError("your mistake")
    elif fault == "silent":
        time.sleep(60)
    elif fault == "until stopped":
        while not channel.has_command("stop"):
            time.sleep(0.01)
            channel.send("step")
    if any(generation == launch.generation for generation, _ in launch.payload) and fault is None:
        time.sleep(30)  # the others wait for the one that fails
    channel.send("said", launch.rank)
    channel.send("finished", launch.rank)
    channel.wait_for("leave", 30)


class Recorder:
    """A delegate that keeps everything it is told."""

    def __init__(self, settings: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
        self.settings = settings
        self.emit = emit
        self.stages = [Stage(name, n, "tests.support.tasks:work") for name, n in settings["stages"]]
        self.log: list[Any] = []

    def next_stage(self) -> Stage | None:
        return self.stages.pop(0) if self.stages else None

    def begin(self) -> int:
        return 0

    def attachment(self, stage: Stage) -> tuple[str, Any] | None:
        return self.settings.get("attachment")

    def position(self) -> int:
        return sum(entry[2] == "step" for entry in self.log if isinstance(entry, tuple))

    def payload(self, stage: Stage, generation: int, workers: int) -> Any:
        return self.settings["faults"]

    def on_message(self, message: Message) -> None:
        self.log.append((message.generation, message.rank, message.kind, message.body))
        self.emit({"event": message.kind})

    def on_event(self, event: dict[str, Any]) -> None:
        self.log.append(event)
        self.emit(event)

    def on_failure(self, failure: GangFailure, silent_s: float) -> None:
        self.log.append(("failed", failure.kind, failure.rank))

    def on_stacks(self, generation: int, stacks: dict[int, str]) -> None:
        self.log.append(("stacks", generation, stacks))

    def result(self, stopped: str | None) -> Any:
        return {"stopped": stopped, "log": self.log}

    def failed(self, error: Exception) -> None:
        self.emit({"event": "failed", "error": str(error)})
