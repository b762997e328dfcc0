"""A worker that goes on until it is told otherwise, for tests of what becomes of its gang."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from cluster.channel import Channel
from cluster.template import Launch


def work(channel: Channel, launch: Launch) -> None:
    """Say so every 20 ms, in a message and in a file of `payload["beats"]`, until a "stop"."""
    channel.send("ready", {"pid": os.getpid(), "faults": launch.faults})
    settings: dict[str, Any] = launch.payload or {}
    while not channel.has_command("stop"):
        time.sleep(0.02)
        channel.send("step")
        if beats := settings.get("beats"):
            file = Path(beats, f"{launch.generation}-{launch.rank}")
            file.write_text(repr(time.monotonic()))
    channel.send("finished", launch.rank)


def last_beat(beats: Path, generation: int, rank: int) -> float:
    """When that worker was last alive, on the clock `time.monotonic` of this machine."""
    text = (beats / f"{generation}-{rank}").read_text()
    return float(text) if text else time.monotonic()


def take_large(channel: Channel, launch: Launch) -> None:
    """Tell the hash of what arrives as "state"."""
    channel.send("ready")
    channel.send("hash", hashlib.sha256(channel.take("state", 60)).hexdigest())
    channel.send("finished", launch.rank)


def send_much(channel: Channel, launch: Launch) -> None:
    """Send `payload` parts of 8 MB at once, then finish."""
    for number in range(launch.payload):
        channel.send("part", b"%04d" % number + bytes(8 * 2**20))
    channel.send("finished", launch.rank)
