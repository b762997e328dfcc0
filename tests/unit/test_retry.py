"""The answer to failures: how often, after which delay, and whose turn it is."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.retry import Failed, RetryPolicy, Verdict

RETRY_NOW = Verdict("retry")

failures = st.builds(
    Failed,
    st.sampled_from(["exception", "exited", "host_lost", "stalled", "not_formed"]),
    st.integers(-1, 3),
    st.sampled_from(["ValueError: a", "ValueError: b", "OSError: a"]),
    step=st.integers(0, 3),
    is_injected=st.booleans(),
)
histories = st.lists(st.tuples(failures, st.floats(0, 100)), max_size=40)
"""Failures, each with the seconds since the one before."""


def exited(step: int, resumed_at: int | None = None) -> Failed:
    return Failed("exited", 1, "rank 1 was killed.", step=step, resumed_at=resumed_at)


def raised(message: str = "ValueError: bad row", step: int = 7, rank: int = 0) -> Failed:
    return Failed("exception", rank, message, f"Traceback of {message}", step)


def judge_all(
    policy: RetryPolicy, history: list[tuple[Failed, float]]
) -> list[tuple[Failed, float, Verdict]]:
    now, judged = 0.0, []
    for failure, wait_s in history:
        now += wait_s
        judged.append((failure, now, policy.judge(failure, now)))
    return judged


def actions(policy: RetryPolicy, *happened: Failed) -> list[str]:
    return [policy.judge(failure, float(n)).action for n, failure in enumerate(happened)]


# How often


def test_one_failure_more_than_allowed_ends_the_run() -> None:
    policy = RetryPolicy(2, 600.0)
    assert actions(policy, exited(1), exited(2)) == ["retry", "retry"]
    verdict = policy.judge(exited(3), 5.0)
    assert verdict.action == "give_up"
    assert verdict.reason.startswith("3 failures within 600 s (cluster.failure_window_s)")
    assert "2 are allowed (cluster.max_failures)" in verdict.reason
    assert "rank 1 was killed. " in verdict.reason


def test_none_allowed_is_none() -> None:
    verdict = RetryPolicy(0, 600.0).judge(exited(1), 0.0)
    assert verdict.action == "give_up"
    assert verdict.reason.startswith("1 failure within")


def test_failures_outside_the_window_are_forgotten() -> None:
    policy = RetryPolicy(1, 10.0)
    assert [policy.judge(exited(n), 11.0 * n).action for n in range(20)] == ["retry"] * 20
    assert policy.judge(exited(30), 219.0).action == "give_up"


@given(histories, st.integers(0, 6), st.floats(1, 200))
def test_never_more_retries_in_a_window_than_allowed(
    history: list[tuple[Failed, float]], max_failures: int, window_s: float
) -> None:
    judged = judge_all(RetryPolicy(max_failures, window_s), history)
    counted = [(now, verdict) for failure, now, verdict in judged if not failure.is_injected]
    for n, (now, verdict) in enumerate(counted):
        within = sum(now - earlier <= window_s for earlier, _ in counted[: n + 1])
        if verdict.action != "users":
            assert verdict.action == ("give_up" if within > max_failures else "retry")


@given(histories, st.integers(0, 6))
def test_what_was_done_on_purpose_changes_nothing(
    history: list[tuple[Failed, float]], max_failures: int
) -> None:
    judged = judge_all(RetryPolicy(max_failures, 50.0), history)
    assert all(verdict == RETRY_NOW for failure, _, verdict in judged if failure.is_injected)
    others = [
        (failure, now, verdict) for failure, now, verdict in judged if not failure.is_injected
    ]
    policy = RetryPolicy(max_failures, 50.0)
    assert [verdict for _, _, verdict in others] == [policy.judge(f, now) for f, now, _ in others]


# Whose turn


def test_the_same_exception_at_the_same_step_three_times_is_the_users() -> None:
    policy = RetryPolicy(5, 600.0)
    assert actions(policy, raised(rank=0), raised(rank=1)) == ["retry", "retry"]
    verdict = policy.judge(raised(rank=1), 3.0)
    assert verdict.action == "users"
    assert "3 times in a row, always after step 7" in verdict.reason
    assert "Rank 1 raised ValueError: bad row. " in verdict.reason
    assert verdict.traceback == "Traceback of ValueError: bad row"


def test_it_is_the_users_even_where_no_more_failures_are_allowed() -> None:
    assert actions(RetryPolicy(2, 600.0), raised(), raised(), raised())[-1] == "users"


@pytest.mark.parametrize(
    "text",
    [
        "TypeError: <object at 0x7f{n}a0>",
        "InvalidArgumentError: [[{{{{node while/Assert}}}}]] [Op:__inference_run_steps_12{n}0]",
        "InvalidArgumentError: in __inference_while_body_3{n}_45{n} of __forward_f_{n}",
    ],
)
def test_numbers_that_processes_give_make_no_other_exception(text: str) -> None:
    same = [raised(text.format(n=n)) for n in range(3)]
    assert actions(RetryPolicy(5, 600.0), *same)[-1] == "users"


def test_the_name_of_a_function_still_tells_exceptions_apart() -> None:
    texts = [f"InvalidArgumentError: [Op:__inference_{name}_7]" for name in ("take", "show", "go")]
    assert actions(RetryPolicy(5, 600.0), *map(raised, texts)) == ["retry"] * 3


def test_an_interlude_on_purpose_does_not_break_the_row() -> None:
    injected = dataclasses.replace(exited(9), is_injected=True)
    assert actions(RetryPolicy(5, 600.0), raised(), raised(), injected, raised())[-1] == "users"


def test_what_differs_is_no_row() -> None:
    for other in (raised(step=8), raised("ValueError: bad column"), exited(7)):
        happened = (raised(), raised(), other, raised(), raised())
        assert actions(RetryPolicy(9, 600.0), *happened) == ["retry"] * 5


def test_machines_may_fail_the_same_way_again_and_again() -> None:
    for kind in ("exited", "host_lost", "stalled", "not_formed"):
        same = [Failed(kind, 1, "gone", step=7)] * 5
        assert actions(RetryPolicy(9, 600.0), *same) == ["retry"] * 5


# After which delay


def delays(*happened: Failed, window_s: float = 600.0, apart_s: float = 1.0) -> list[float]:
    policy = RetryPolicy(99, window_s)
    return [policy.judge(failure, n * apart_s).delay_s for n, failure in enumerate(happened)]


def test_attempts_in_vain_wait_longer_and_longer() -> None:
    assert delays(*[exited(7)] * 9) == [0, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_completed_step_ends_the_waiting() -> None:
    assert delays(*map(exited, (7, 7, 7, 8, 8, 9))) == [0, 1, 2, 0, 1, 0]


def test_steps_that_were_taken_again_count_as_completed() -> None:
    assert delays(exited(150, 0), exited(140, 100), exited(100, 100)) == [0, 0, 1]


def test_after_a_quiet_window_a_failure_is_the_first() -> None:
    assert delays(*[exited(7)] * 3, window_s=10.0, apart_s=11.0) == [0, 0, 0]


@given(st.integers(0, 3000))
def test_no_delay_is_longer_than_half_a_minute(count: int) -> None:
    policy = RetryPolicy(10_000, 600.0)
    verdicts = [policy.judge(exited(7), 0.0) for _ in range(count)]
    assert all(0 <= verdict.delay_s <= 30 for verdict in verdicts)
