"""Small files of a run: JSON, whole or not at all, and logs of one JSON value a line."""

import itertools
import json
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

_RECORDS_WAITING = 10_000


class RecordLog:
    """A .jsonl file that one process adds to, from any thread.

    A full disk tears no line and raises nothing: what cannot be written waits in memory, in its
    order, and goes with the next record. A line that a killed writer left half written is cut off
    before the first record.

    Args:
        path: The file; made by the first record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._one_at_a_time = threading.Lock()
        self._waiting: deque[bytes] = deque(maxlen=_RECORDS_WAITING)
        self._is_whole = False

    def append(self, record: dict[str, Any]) -> bool:
        """Add one line; returns whether it is on the disk."""
        with self._one_at_a_time:
            self._waiting.append(json.dumps(record).encode() + b"\n")
            return self._write()

    def records(self) -> list[dict[str, Any]]:
        """All records, those that wait too."""
        with self._one_at_a_time:
            lines = [*self._lines(), *self._waiting]
        return [json.loads(line) for line in lines]

    def cut(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        """Take back the first record that is not kept, and all after it; needs no room."""
        with self._one_at_a_time:
            size_bytes, lines = 0, self._lines()
            for line in lines:
                if not is_kept(json.loads(line)):
                    os.truncate(self._path, size_bytes)
                    self._waiting.clear()
                    return
                size_bytes += len(line)
            waiting = list(self._waiting)
            kept = itertools.takewhile(lambda line: is_kept(json.loads(line)), waiting)
            self._waiting = deque(kept, maxlen=_RECORDS_WAITING)

    def _lines(self) -> list[bytes]:
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().splitlines(keepends=True)
        return [line for line in lines if line.endswith(b"\n")]

    def _write(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError:
            return False
        try:
            if not self._is_whole:
                os.ftruncate(descriptor, sum(map(len, self._lines())))
                self._is_whole = True
            while self._waiting:
                if not _write_or_undo(descriptor, self._waiting[0]):
                    return False
                self._waiting.popleft()
            return True
        finally:
            os.close(descriptor)


def _write_or_undo(descriptor: int, line: bytes) -> bool:
    """Write a line at the end of a file, whole or not at all."""
    end = os.fstat(descriptor).st_size
    try:
        is_written = os.write(descriptor, line) == len(line)
    except OSError:
        is_written = False
    if not is_written:
        os.ftruncate(descriptor, end)
    return is_written


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None where there is nothing."""
    return dict(json.loads(path.read_text())) if path.exists() else None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
