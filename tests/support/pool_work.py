"""What stations do in the tests of pools."""

import os
import signal
import time
from typing import Any

TARGET = "tests.support.pool_work:Work"


class Work:
    def __init__(self, mark: str) -> None:
        self._mark, self._tasks = mark, 0

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        self._tasks += 1
        if task["do"] == "fail":
            raise ValueError("as told")
        if task["do"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if task["do"] == "sleep":
            time.sleep(60)
        return {
            "value": task["value"],
            "mark": self._mark,
            "tasks": self._tasks,
            "pid": os.getpid(),
            "nice": os.nice(0),
            "word": os.environ["POOL_WORD"],
        }
