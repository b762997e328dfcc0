"""The watch: when a gang counts as stalled, and whom it says was behind."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.watch import PULSE_S, Stall, Watch

READY_S = 120.0
STALL_S = 10.0


class Gang:
    """Ranks that pulse each second, checked each second, in place of processes."""

    def __init__(self, workers: int, stall_after_s: float = STALL_S, is_ready: bool = True) -> None:
        self.now = 1000.0
        self.watch = Watch(workers, READY_S, stall_after_s, self.now)
        self.actions = dict.fromkeys(range(workers), 0)
        self.places = dict.fromkeys(range(workers), "step 0")
        self.frozen: set[int] = set()
        if is_ready:
            self.get_ready(*range(workers))

    def get_ready(self, *ranks: int) -> None:
        for rank in ranks:
            self.watch.heard(rank, self.now)
            self.watch.ready(rank)

    def act(self, *ranks: int) -> None:
        for rank in ranks:
            self.actions[rank] += 1
            self.places[rank] = f"step {self.actions[rank]}"

    def run(self, seconds: int, each_second: Callable[[], None] = lambda: None) -> Stall | None:
        for _ in range(seconds):
            self.now += PULSE_S
            each_second()
            for rank in set(self.actions) - self.frozen:
                self.watch.pulse(rank, self.actions[rank], self.places[rank], self.now)
            if stall := self.watch.check(self.now):
                return stall
        return None

    def stall(self) -> Stall:
        stall = self.run(int(STALL_S) + 1)
        assert stall is not None
        return stall


# Forming


def test_a_gang_may_form_as_long_as_the_field_allows() -> None:
    gang = Gang(3, is_ready=False)
    gang.get_ready(0, 2)
    assert gang.run(int(READY_S) - 1) is None
    stall = gang.run(1)
    assert stall is not None
    assert (stall.kind, stall.rank) == ("not_formed", 1)
    assert "rank 1 did not form within 120 s (cluster.start_timeout_s)" in stall.sentence
    assert "ranks 0 and 2 waited" in stall.sentence


def test_several_that_did_not_form_are_named_together() -> None:
    gang = Gang(3, is_ready=False)
    gang.get_ready(1)
    stall = gang.run(int(READY_S))
    assert stall is not None
    assert (stall.kind, stall.rank) == ("not_formed", -1)
    assert "ranks 0 and 2 did not form within 120 s" in stall.sentence
    assert "rank 1 waited" in stall.sentence


def test_one_that_froze_while_all_form_is_told_from_those_that_wait_for_it() -> None:
    """Before the bound of forming, as soon as a standstill counts."""
    gang = Gang(3, is_ready=False)
    gang.frozen = {2}
    assert gang.run(int(STALL_S) - 1) is None
    stall = gang.run(1)
    assert stall is not None
    assert (stall.kind, stall.rank) == ("not_formed", 2)
    assert f"rank 2 did not form and is silent for {STALL_S:g} s" in stall.sentence
    assert "ranks 0 and 1 waited" in stall.sentence


def test_where_all_are_silent_while_they_form_nobody_is_blamed() -> None:
    gang = Gang(2, is_ready=False)
    gang.frozen = {0, 1}
    assert gang.run(int(READY_S) - 1) is None
    stall = gang.run(1)
    assert stall is not None
    assert (stall.kind, stall.rank) == ("not_formed", -1)
    assert "rank 1 was last heard 120 s ago at its start" in stall.sentence


def test_the_time_of_forming_is_no_standstill() -> None:
    gang = Gang(2, is_ready=False)
    assert gang.run(100) is None
    gang.get_ready(0, 1)
    assert gang.run(int(STALL_S) - 1) is None
    assert gang.run(1) is not None


# Standing still


def test_a_gang_that_goes_on_is_not_stalled() -> None:
    gang = Gang(2)
    assert gang.run(1000, lambda: gang.act(0, 1)) is None


def test_one_rank_that_goes_on_is_enough() -> None:
    gang = Gang(2)
    assert gang.run(1000, lambda: gang.act(1)) is None


def test_a_gang_that_stands_exactly_so_long_is_stalled() -> None:
    gang = Gang(2)
    assert gang.run(5, lambda: gang.act(0, 1)) is None
    assert gang.run(int(STALL_S) - 1) is None
    stall = gang.run(1)
    assert stall is not None
    assert stall.kind == "stalled"
    assert "for 10 s (cluster.stall_after_s=10)" in stall.sentence


def test_the_rank_with_the_fewest_actions_is_behind() -> None:
    gang = Gang(3)
    gang.run(5, lambda: gang.act(0, 1, 2))
    gang.act(0, 2)
    stall = gang.stall()
    assert stall.rank == 1
    assert "rank 1 is behind, at step 5" in stall.sentence
    assert "ranks 0 and 2 waited at step 6" in stall.sentence


def test_several_that_are_behind_are_all_named() -> None:
    gang = Gang(4)
    gang.act(1, 3)
    stall = gang.stall()
    assert stall.rank == 0
    assert "ranks 0 and 2 are behind, at step 0" in stall.sentence


def test_a_rank_without_a_pulse_is_behind_whatever_its_count() -> None:
    gang = Gang(3)
    gang.run(5, lambda: gang.act(0, 1, 2))
    gang.act(2)
    gang.run(1)
    gang.frozen = {2}
    stall = gang.stall()
    assert stall.rank == 2
    assert "rank 2 is behind" in stall.sentence
    assert "rank 2 was last heard 10 s ago at step 6" in stall.sentence
    assert "ranks 0 and 1 waited at step 5" in stall.sentence


def test_other_messages_are_signs_of_life_but_no_progress() -> None:
    gang = Gang(2)
    gang.frozen = {1}
    gang.act(0)
    stall = gang.run(int(STALL_S) + 1, lambda: gang.watch.heard(1, gang.now))
    assert stall is not None
    assert "last heard" not in stall.sentence
    assert stall.rank == 1


def test_where_all_are_equal_the_place_is_named() -> None:
    gang = Gang(2)
    gang.places = {0: "checkpoint", 1: "checkpoint"}
    stall = gang.stall()
    assert stall.rank == -1
    assert "all 2 workers live and stand for 10 s" in stall.sentence
    assert stall.sentence.endswith("at checkpoint.")


def test_where_nobody_is_heard_nobody_is_blamed() -> None:
    gang = Gang(2)
    gang.frozen = {0, 1}
    stall = gang.stall()
    assert stall.rank == -1
    assert "no worker has been heard" in stall.sentence


@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_lone_worker_is_behind_itself(is_frozen: bool) -> None:
    gang = Gang(1)
    gang.act(0)
    gang.run(1)
    gang.frozen = {0} if is_frozen else set()
    stall = gang.stall()
    assert stall.rank == 0
    assert "rank 0 stands still" in stall.sentence
    assert ("last heard" in stall.sentence) == is_frozen


def test_a_rank_that_has_finished_is_not_behind() -> None:
    gang = Gang(2)
    gang.act(0)
    gang.watch.finished(1)
    stall = gang.stall()
    assert stall.rank == 0
    assert "rank 0 is behind, at step 1" in stall.sentence


def test_a_thousand_ranks_make_one_sentence() -> None:
    gang = Gang(1000)
    gang.act(5)
    stall = gang.stall()
    assert "ranks 0, 1, 2, 3, 4, 6, 7, 8 and 991 more are behind" in stall.sentence
    assert len(stall.sentence) < 300


@settings(deadline=None)
@given(
    st.integers(2, 6).flatmap(
        lambda workers: st.tuples(st.just(workers), st.integers(0, workers - 1))
    ),
    st.integers(0, 30),
    st.integers(3, 60),
    st.booleans(),
)
def test_the_rank_that_stops_acting_is_named_in_time(
    workers_and_culprit: tuple[int, int], steps: int, stall_after_s: int, is_frozen: bool
) -> None:
    workers, culprit = workers_and_culprit
    gang = Gang(workers, float(stall_after_s))
    everyone = range(workers)
    assert gang.run(steps, lambda: gang.act(*everyone)) is None
    gang.frozen = {culprit} if is_frozen else set()
    gang.act(*(rank for rank in everyone if rank != culprit))  # into the collective, and wait
    stall = gang.run(stall_after_s + 1)
    assert stall is not None
    assert stall.rank == culprit
