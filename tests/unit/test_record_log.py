"""Logs of one value a line, on disks that fill up and under writers that die."""

import errno
import os
from pathlib import Path

import pytest

from trainer import files as files_module
from trainer.files import RecordLog


class Disk:
    """Room for so many bytes; what does not fit is written in part, as file systems do."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._write = os.write

    def write(self, descriptor: int, data: bytes) -> int:
        fits = data[: self.room]
        if not fits:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(fits)
        return self._write(descriptor, fits)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(10**9)
    monkeypatch.setattr(files_module.os, "write", made.write)
    return made


def test_a_full_disk_tears_no_line_and_what_waited_comes_in_its_order(
    tmp_path: Path, disk: Disk
) -> None:
    path = tmp_path / "log.jsonl"
    log = RecordLog(path)
    assert log.append({"n": 0})
    disk.room = 4
    assert [log.append({"n": number}) for number in (1, 2)] == [False, False]
    assert path.read_text() == '{"n": 0}\n'
    assert log.records() == [{"n": 0}, {"n": 1}, {"n": 2}]
    disk.room = 10**9
    assert log.append({"n": 3})
    assert path.read_text() == "".join(f'{{"n": {number}}}\n' for number in range(4))


def test_a_line_that_a_dead_writer_left_half_written_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 0}\n{"n": ')
    log = RecordLog(path)
    assert log.records() == [{"n": 0}]
    log.append({"n": 1})
    assert path.read_text() == '{"n": 0}\n{"n": 1}\n'


@pytest.mark.parametrize(("kept", "left"), [(0, 0), (1, 1), (2, 2), (3, 3), (9, 4)])
def test_the_end_is_taken_back_without_room(
    tmp_path: Path, disk: Disk, kept: int, left: int
) -> None:
    path = tmp_path / "log.jsonl"
    log = RecordLog(path)
    for number in (0, 1):
        log.append({"n": number})
    disk.room = 0
    for number in (2, 3):
        log.append({"n": number})
    log.cut(lambda record: record["n"] < kept)
    assert log.records() == [{"n": number} for number in range(left)]
    disk.room = 10**9
    log.append({"n": 8})
    assert RecordLog(path).records() == [*({"n": number} for number in range(left)), {"n": 8}]


def test_a_folder_that_is_not_there_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "later" / "log.jsonl"
    log = RecordLog(path)
    assert not log.append({"n": 0})
    path.parent.mkdir()
    assert log.append({"n": 1})
    assert log.records() == [{"n": 0}, {"n": 1}]
