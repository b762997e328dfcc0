"""Writers of checkpoints that are killed: at any moment, and at each call that counts.

Run as a module with a folder and `moments` or `calls`; prints what a reader saw, as JSON.
"""

import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.checkpoint_store import CheckpointStore, Found, Origin

KILLS = 40
START_S = 30
ORIGIN = Origin("run", "job")
_COUNTED = ("fsync", "replace", "unlink")


def main(folder: str, mode: str) -> None:
    """Kill one writer after the other, and look."""
    look = {"moments": _at_moments, "calls": _at_calls}[mode]
    sys.stdout.write(json.dumps(look(folder)))


def save(store: CheckpointStore, step: int, generation: int) -> None:
    """A checkpoint whose arrays all say which one they belong to."""
    arrays: dict[str, Any] = {
        f"model/{index}": np.full(50_000, step + generation / 1000 + index) for index in range(4)
    }
    store.save(step, generation, arrays, {"step": step, "generation": generation})


def _look(store: CheckpointStore) -> dict[str, Any]:
    found, skipped = store.newest()
    return {
        "place": None if found is None else [found.generation, found.step],
        "is_whole": found is None or _is_whole(found),
        "skipped": skipped,
    }


def _is_whole(found: Found) -> bool:
    of_all = found.step + found.generation / 1000
    return found.meta == {"step": found.step, "generation": found.generation} and all(
        bool((found.arrays[f"model/{index}"] == of_all + index).all()) for index in range(4)
    )


def _at_moments(folder: str) -> list[dict[str, Any]]:
    """Writers save without a pause; the reader looks while they do, and after their death."""
    store = CheckpointStore(folder, ORIGIN)
    chance = random.Random(0)
    looks = []
    for generation in range(1, KILLS + 1):
        told, telling = os.pipe()
        child = os.fork()
        if child == 0:
            _save_for_ever(store, generation, telling)
        os.close(telling)
        select.select([told], [], [], START_S)  # until a save has returned
        end = time.monotonic() + chance.uniform(0, 0.1)
        while time.monotonic() < end:
            looks.append({**_look(store), "acknowledged": None})
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps = _read_all(told)
        names = os.listdir(folder)
        is_cut = any(name.endswith(".partial") for name in names)
        looks.append({**_look(store), "acknowledged": [generation, len(steps)], "is_cut": is_cut})
        if generation % 4 == 0:
            store.clean()
    return looks


def _save_for_ever(store: CheckpointStore, generation: int, telling: int) -> None:
    step = 0
    while True:
        step += 1
        save(store, step, generation)
        os.write(telling, b".")
        store.prune(4, None, "auto")


def _read_all(told: int) -> bytes:
    data = b""
    while select.select([told], [], [], 5)[0]:
        more = os.read(told, 2**16)
        if not more:
            break
        data += more
    os.close(told)
    return data


def _at_calls(folder: str) -> list[dict[str, Any]]:
    """A writer dies at the first, second ... of the calls that change what others see."""
    looks: list[dict[str, Any]] = []
    for fatal in range(40):
        store = CheckpointStore(f"{folder}/{fatal}", ORIGIN)
        save(store, 1, 1)
        child = os.fork()
        if child == 0:
            _die_at(fatal)
            save(store, 2, 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        looks.append({**_look(store), "was_killed": os.WIFSIGNALED(status)})
        if not looks[-1]["was_killed"]:
            return looks
    return looks


def _die_at(fatal: int) -> None:
    """Before the call for even numbers, after it for odd ones."""
    made = [0]

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            number = made[0]
            made[0] += 2
            if number == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*arguments, **more)
            finally:
                if number + 1 == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

        return counted

    for name in _COUNTED:
        setattr(os, name, deadly(getattr(os, name)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
