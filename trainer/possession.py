"""Who owns a run: one coordinator at a time, and the number of its newest generation.

The owner holds a lock on the run folder, which the kernel releases when it dies, whatever kills it.
Under the lock it writes down each generation before that forms, so that a later owner goes on
counting: numbers never repeat, and what an earlier generation wrote cannot pass for newer.
"""

import fcntl
import json
import os
import time
from pathlib import Path

from trainer.errors import RunFolderError

_LOCK = "owner.lock"
_COUNT = "generation.json"
_COUNT_BYTES = 64
_WAIT_S = 20.0
_RETRY_S = 0.1


class Possession:
    """A run folder that this process owns; released by `release` or by its end.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def acquire(self, wait_s: float = _WAIT_S) -> int:
        """Become the owner; waits for one that is just ending.

        Returns:
            The newest generation there ever was; 0 in a new run.

        Raises:
            RunFolderError: Another coordinator is at work.
        """
        descriptor = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise RunFolderError(
                        f"{self._folder} is in use by another coordinator; one at a time is "
                        "allowed. Wait for its end, or stop it first."
                    ) from None
                time.sleep(_RETRY_S)
        self._descriptor = descriptor
        count = self._folder / _COUNT
        generation = int(json.loads(count.read_text())["generation"]) if count.exists() else 0
        self.record(generation)
        return generation

    def record(self, generation: int) -> None:
        """Write down a generation that is about to form.

        Always into the same bytes, in one call: a disk that has become full has room for them.
        """
        text = json.dumps({"generation": generation}).ljust(_COUNT_BYTES - 1) + "\n"
        count = os.open(self._folder / _COUNT, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(count, text.encode(), 0)
        finally:
            os.close(count)

    def release(self) -> None:
        """Let another one own it. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
