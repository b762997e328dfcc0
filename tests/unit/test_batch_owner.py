"""Who is known to be gone."""

import os
import socket
import subprocess
import sys

from serving.batch_owner import holder_name, is_dead


def test_this_process_lives_and_one_that_ended_does_not():
    mine = holder_name()
    assert not is_dead(mine)
    assert holder_name() != mine  # two loops of one process are two
    host, pid, started, token = mine.split(" ")
    assert (host, int(pid)) == (socket.gethostname(), os.getpid())
    assert is_dead(f"{host} {pid} {int(started) + 1} {token}")  # its number was used again
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    assert is_dead(f"{host} {int(ended.stdout)} {started} {token}")


def test_nothing_is_known_of_other_machines():
    assert not is_dead("elsewhere 1 1 x")
    assert not is_dead("")
