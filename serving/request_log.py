"""One line of JSON for each request: who asked what, and what became of it.

Owns the fields. A line never holds a key, a body, or a query string, which may hold either.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

_FLUSH_S = 0.5


class RequestLog:
    """Appends lines to a file; None writes them nowhere. Used from one thread.

    Args:
        path: The file; made where it is missing.
        most_bytes: The file is put aside as `NAME.1` when it has grown to this.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        path: Path | None = None,
        most_bytes: int = 64 * 2**20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._clock = clock
        self._file: TextIO | None = None
        self._flushed_at = 0.0

    def write(
        self,
        request_id: str,
        user: str | None,
        method: str,
        path: str,
        status: int,
        seconds: float,
        client: str = "",
    ) -> None:
        """Write one line; it is on the disk within a second, given another request or `flush`."""
        if self._path is None:
            return
        now = self._clock()
        line = json.dumps(
            {
                "at": round(now, 3),
                "request_id": request_id,
                "user": user,
                "method": method,
                "path": path[:512],
                "status": status,
                "ms": round(seconds * 1000, 3),
                "client": client,
            }
        )
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(line + "\n")
        if now - self._flushed_at > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Bring all lines to the file, and put the file aside where it is full."""
        self._flushed_at = self._clock()
        if self._file is None or self._path is None:
            return
        self._file.flush()
        if self._file.tell() > self._most_bytes:
            self._file.close()
            self._file = None
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))

    def close(self) -> None:
        """Write what is held back and close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None


class JsonFormatter(logging.Formatter):
    """Lines of Python's logging as JSON, in the manner of the request log."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        fields = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)
