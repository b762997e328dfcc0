"""Checkpoints that say which step and generation they are of."""

from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint_store import CheckpointStore, Found, Origin

OURS = Origin("run-1", "job-a")
OTHER_JOB = Origin("run-1", "job-b")
OTHER_RUN = Origin("run-2", "job-a")


def store_in(folder: Path | str, origin: Origin = OURS) -> CheckpointStore:
    return CheckpointStore(str(folder), origin, now=lambda: 1234.5)


def arrays_of(step: int, generation: int) -> dict[str, Any]:
    return {"model/value": np.full(50, step + generation / 1000), "empty": np.zeros(0, "f4")}


def save(store: CheckpointStore, step: int, generation: int = 1, **more: Any) -> str:
    meta = {"step": step, "generation": generation}
    return store.save(step, generation, arrays_of(step, generation), meta, **more)


def is_whole(found: Found | None) -> bool:
    """Whether all of it is of the step and generation that it says."""
    assert found is not None
    expected = arrays_of(found.step, found.generation)
    assert found.meta == {"step": found.step, "generation": found.generation}
    assert found.arrays.keys() == expected.keys()
    return all(np.array_equal(found.arrays[name], expected[name]) for name in expected)


def place_of(found: Found | None) -> tuple[int, int] | None:
    return None if found is None else (found.step, found.generation)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def stem(step: int, generation: int = 1) -> str:
    return f"step-{step:010d}-g{generation:06d}"


def files(*places: tuple[int, int]) -> list[str]:
    return sorted(f"{stem(*place)}.{end}" for place in places for end in ("h5", "json"))
