"""A training process's end of the channel, with a plain pipe in the host's place."""

import multiprocessing

import pytest

from cluster import channel as channels
from cluster.channel import Channel
from cluster.faults import TOLD, FaultPlan


@pytest.mark.parametrize("kind", TOLD)
def test_a_fault_that_is_only_told_of_is_not_struck_here(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_STRUCK_WITHIN_S", 0.0)
    monkeypatch.setattr(channels, "strike", lambda kind: pytest.fail(f"{kind} was struck"))
    for thread in ("_listen", "_tell"):  # which ends the process with its host, and pulses
        monkeypatch.setattr(Channel, thread, lambda self: None)
    target = "" if kind == "coordinator" else ":0"
    plan = FaultPlan.parse(f"{kind}{target}@step=4")
    ours, theirs = multiprocessing.Pipe()
    channel = Channel(theirs, rank=0, generation=1, faults=plan.for_rank(0, workers=1))
    channel.mark("step", 3)
    assert not ours.poll(0)
    channel.mark("step", 4)
    assert ours.recv() == ("fault", plan.faults[0])
