"""One coordinator at a time owns a run; its generations never repeat."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import RunFolderError
from trainer.possession import Possession

HOLDER = """
import sys
from pathlib import Path
from trainer.possession import Possession

possession = Possession(Path(sys.argv[1]))
possession.acquire(0)
possession.record(7)
print("mine", flush=True)
sys.stdin.read()
"""


def test_a_new_run_has_no_generation(tmp_path: Path) -> None:
    assert Possession(tmp_path).acquire(0) == 0


def test_a_later_owner_goes_on_counting(tmp_path: Path) -> None:
    first = Possession(tmp_path)
    first.acquire(0)
    first.record(4)
    first.record(5)
    first.release()
    first.release()
    assert Possession(tmp_path).acquire(0) == 5


def test_a_second_owner_is_refused_and_the_first_one_stays(tmp_path: Path) -> None:
    first, second = Possession(tmp_path), Possession(tmp_path)
    first.acquire(0)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with pytest.raises(RunFolderError, match="in use by another coordinator; one at a time"):
            second.acquire(0)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    first.record(1)
    first.release()
    assert second.acquire(0) == 1


def test_other_folders_are_free(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    Possession(tmp_path / "a").acquire(0)
    assert Possession(tmp_path / "b").acquire(0) == 0


def test_a_killed_owner_leaves_nothing_locked_and_its_count(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"mine\n"
        with pytest.raises(RunFolderError, match="in use"):
            Possession(tmp_path).acquire(0)
        holder.send_signal(signal.SIGKILL)
    assert Possession(tmp_path).acquire(0) == 7


def test_counting_needs_no_more_room(tmp_path: Path) -> None:
    possession = Possession(tmp_path)
    possession.acquire(0)
    count = tmp_path / "generation.json"
    sizes, files = set(), set()
    for generation in (0, 9, 10**12):
        possession.record(generation)
        sizes.add(count.stat().st_size)
        files.add(count.stat().st_ino)
    assert (len(sizes), len(files)) == (1, 1)
    possession.release()
    assert Possession(tmp_path).acquire(0) == 10**12
