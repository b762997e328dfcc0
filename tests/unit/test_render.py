"""What is shown while files are converted."""

import io

import pytest
from rich.console import Console

from lockstep.render import TrainingView


@pytest.mark.parametrize("is_terminal", [True, False])
def test_conversion_is_announced_once_a_role(is_terminal):
    out = io.StringIO()
    view = TrainingView(Console(file=out, force_terminal=is_terminal, width=80))
    for role in ("train", "test"):
        for done in (0, 50, 100, 100):
            view.converting(role, done, 100)
    view.close()
    assert out.getvalue().count("converting data.train to Parquet") == 1
    assert out.getvalue().count("converting data.test to Parquet") == 1
    assert ("100/100 bytes" in out.getvalue()) == is_terminal
