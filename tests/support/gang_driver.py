"""A run in small: forms a gang of stand-ins again and again, and says as JSON lines what happens.

Run as a module with the address of a Ray and a JSON object: fields of a `GangSpec`, and `beats`, a
folder. It ends with its standard input.
"""

import json
import sys
import threading
import time
from typing import Any

import ray

from cluster.errors import GangFailure
from cluster.gang import Gang, GangSpec


def say(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, "t": time.monotonic(), **fields}), flush=True)


def follow(gang: Gang, ended: threading.Event) -> str:
    """Follow a generation until it has to be formed anew; returns why."""
    ready = 0
    checked_at = time.monotonic()
    for message in gang.messages():
        if ended.is_set():
            return "ended"
        if message is not None and message.kind == "exited":
            raise GangFailure(f"exited with {message.body}", "exited", message.rank)
        if message is not None and message.kind == "ready":
            ready += 1
            if ready == gang.size:
                say("running", workers=gang.size)
        if time.monotonic() - checked_at > 0.5:
            checked_at = time.monotonic()
            if gang.can_grow():
                return "growing"
            if leaving := gang.leaving():
                say("leaving", ranks=sorted(leaving))
                return "leaving"
    return "ended"


def main() -> None:
    settings = json.loads(sys.argv[2])
    payload = {"beats": settings.pop("beats")}
    settings["preload"] = tuple(settings["preload"])
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    gang = Gang(GangSpec(**settings))
    try:
        gang.place()
        generation = 0
        while not ended.is_set():
            generation += 1
            try:
                restored = gang.restore()
                pids = gang.form(
                    generation, restored.workers, "tests.support.gang_tasks:work", payload
                )
                say(
                    "formed",
                    generation=generation,
                    workers=restored.workers,
                    replaced=restored.replaced,
                    lost=restored.lost,
                    nodes=gang.nodes,
                    pids=pids,
                    spares=[seat.address for seat in gang._roster.spares],
                )
                say(follow(gang, ended))
            except GangFailure as failure:
                say("failure", kind=failure.kind, rank=failure.rank, error=str(failure))
            gang.kill()
    except Exception as error:
        say("error", kind=type(error).__name__, error=str(error))
    finally:
        gang.close()
        say("closed")


if __name__ == "__main__":
    main()
