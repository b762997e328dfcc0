"""A station: a process that works off one task at a time, for a pool.

Run as `python -m cluster.station FD TARGET OPTIONS`. TARGET is `module:factory`; what the factory
gives has a method `run(task)`. A station ends when its pool does, in the middle of a task too: one
thread listens while the main thread works.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from cluster.template import resolve

_NICE = 10


class Station:
    """What works, made at the first task. Used by one thread at a time.

    Args:
        target: `module:factory`.
        options: Plain values for the factory.
    """

    def __init__(self, target: str, options: dict[str, Any]) -> None:
        self._target, self._options = target, options
        self._worker: Any = None

    def run(self, task: Any) -> tuple[str, Any]:
        """Work off a task; ("done", result) or ("failed", message)."""
        try:
            if self._worker is None:
                self._worker = resolve(self._target)(**self._options)
            return "done", self._worker.run(task)
        except Exception as error:  # the main of a task: told to whoever gave it
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            return "failed", f"{type(error).__name__}: {error}"


def main() -> None:
    """Work off what the pool sends until it is gone."""
    connection = Connection(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the pool, which ends us
    os.nice(_NICE)  # requests that somebody waits for go first
    station = Station(sys.argv[2], json.loads(sys.argv[3]))
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, tasks), daemon=True).start()
    while True:
        outcome = station.run(tasks.get())
        try:
            connection.send(outcome)
        except OSError:
            os._exit(1)


def _listen(connection: Connection, tasks: "queue.SimpleQueue[Any]") -> None:
    while True:
        try:
            tasks.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)


if __name__ == "__main__":
    main()
