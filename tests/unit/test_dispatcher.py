"""Fair shares: the dispatcher alone, in simulated time."""

import heapq
import itertools
import time
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.dispatcher import Dispatcher, Turn


class Simulation:
    """Predictors that take the seconds they are told to, on a clock of their own."""

    def __init__(self, dispatcher, predictors, seconds=lambda turn: 1.0, load_s=0.0):
        self.dispatcher, self.seconds, self.load_s = dispatcher, seconds, load_s
        self.clock_s = 0.0
        self.idle = list(range(predictors))
        self.loaded = defaultdict(set)
        self.busy: list[tuple[float, int, int, Turn]] = []
        self.begun: list[tuple[float, Turn]] = []
        self.served = Counter()
        self.loads = 0

    def start(self):
        while self.idle:
            predictor = self.idle[-1]
            turn = self.dispatcher.next(self.loaded[predictor])
            if turn is None:
                return
            self.idle.pop()
            self.begun.append((self.clock_s, turn))
            took_s = self.seconds(turn)
            if turn.model not in self.loaded[predictor]:
                self.loaded[predictor] = {turn.model}
                self.loads += 1
                took_s += self.load_s
            heapq.heappush(self.busy, (self.clock_s + took_s, turn.ticket, predictor, turn))

    def step(self):
        end_s, _, predictor, turn = heapq.heappop(self.busy)
        self.served[turn.user] += self.seconds(turn)
        self.clock_s = end_s
        self.idle.append(predictor)
        self.dispatcher.complete(turn, self.seconds(turn))

    def run(self, until_s=float("inf")):
        self.start()
        while self.busy and self.busy[0][0] <= until_s:
            self.step()
            self.start()
        return self

    def begun_of(self, user):
        return [at for at, turn in self.begun if turn.user == user]


def flood(dispatcher, user, shards, model="m", rows=1000, **options):
    dispatcher.set_user(user, **options)
    job = f"{user}-{shards}"
    dispatcher.add_job(job, user, model)
    dispatcher.add_shards(job, [(number, rows) for number in range(shards)])
    return job


def jain(values):
    values = list(values)
    return sum(values) ** 2 / (len(values) * sum(v * v for v in values))


@pytest.mark.parametrize("predictors", [1, 2, 7])
@pytest.mark.parametrize("model", ["m", "other"])
def test_a_small_job_starts_at_once_beside_a_flood(predictors, model):
    dispatcher = Dispatcher(predictors)
    simulation = Simulation(dispatcher, predictors)
    flood(dispatcher, "a", 1000)
    simulation.run(until_s=50.5)
    submitted_s = simulation.clock_s
    flood(dispatcher, "b", 1, model)
    simulation.run()
    (begun_s,) = simulation.begun_of("b")
    assert begun_s - submitted_s <= predictors + 1
    assert len(simulation.begun) == 1001


def test_twenty_equal_users_get_equal_compute_whatever_their_shards_take():
    dispatcher = Dispatcher(4)
    users = [f"u{n}" for n in range(20)]
    takes = {user: 0.5 + 0.25 * (n % 8) for n, user in enumerate(users)}
    simulation = Simulation(dispatcher, 4, lambda turn: takes[turn.user])
    for n, user in enumerate(users):
        flood(dispatcher, user, 400, model=f"m{n % 3}")
    simulation.run(until_s=300)
    assert jain(simulation.served.values()) > 0.95
    shards = Counter(turn.user for _, turn in simulation.begun)
    assert jain(shards.values()) < 0.95  # so it is compute, not shards, that is shared


def test_compute_follows_weights():
    dispatcher = Dispatcher(3)
    simulation = Simulation(dispatcher, 3)
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    for user, weight in weights.items():
        flood(dispatcher, user, 3000, weight=weight)
    simulation.run(until_s=400)
    for user, weight in weights.items():
        assert simulation.served[user] == pytest.approx(1200 * weight / 8, rel=0.05)


def test_a_user_alone_has_all_predictors_and_gives_them_up():
    dispatcher = Dispatcher(8)
    simulation = Simulation(dispatcher, 8)
    flood(dispatcher, "a", 100)
    simulation.start()
    assert len(simulation.busy) == 8
    flood(dispatcher, "b", 100)
    simulation.run(until_s=4.5)
    running = Counter(turn.user for *_, turn in simulation.busy)
    assert running == {"a": 4, "b": 4}


def test_what_is_not_used_by_one_is_used_by_the_other():
    """The share of a user is no limit where nobody else waits."""
    dispatcher = Dispatcher(4)
    flood(dispatcher, "b", 1)
    flood(dispatcher, "a", 9)
    given = Counter()
    while (turn := dispatcher.next()) is not None and sum(given.values()) < 4:
        given[turn.user] += 1
    assert given == {"a": 3, "b": 1}


def test_a_hard_limit_holds_even_where_predictors_idle():
    dispatcher = Dispatcher(8)
    flood(dispatcher, "a", 9, most_running=2)
    first, second = dispatcher.next(), dispatcher.next()
    assert dispatcher.next() is None
    dispatcher.complete(first, 1.0)
    assert dispatcher.next() is not None
    assert dispatcher.next() is None
    dispatcher.set_user("a", most_running=3)
    assert dispatcher.next() is not None
    dispatcher.complete(second, 1.0)


def test_absence_earns_no_credit():
    dispatcher = Dispatcher(1)
    simulation = Simulation(dispatcher, 1)
    flood(dispatcher, "b", 1)
    simulation.run()
    flood(dispatcher, "a", 500)
    simulation.run(until_s=200)
    flood(dispatcher, "b", 300)
    from_s = simulation.clock_s
    simulation.run(until_s=from_s + 100)
    late = Counter(turn.user for at, turn in simulation.begun if at > from_s)
    assert abs(late["a"] - late["b"]) <= 2


def test_a_wrong_estimate_is_corrected():
    """Whose rows take ten times as long has a tenth of the shards, not ten times the compute."""
    dispatcher = Dispatcher(1)
    simulation = Simulation(dispatcher, 1, lambda turn: 10.0 if turn.user == "slow" else 1.0)
    flood(dispatcher, "slow", 400)
    flood(dispatcher, "fast", 4000)
    simulation.run(until_s=1000)
    assert simulation.served["slow"] == pytest.approx(500, abs=25)


def test_within_a_user_priority_goes_first_then_age():
    dispatcher = Dispatcher(1)
    for job, priority in (("old", 0), ("new", 0), ("urgent", 5)):
        dispatcher.add_job(job, "a", "m", priority=priority)
        dispatcher.add_shards(job, [(0, 1), (1, 1)])
    assert [dispatcher.standings()[job][0] for job in ("urgent", "old", "new")] == [0, 1, 2]
    order = [dispatcher.next() for _ in range(6)]
    assert [turn.job for turn in order] == ["urgent"] * 2 + ["old"] * 2 + ["new"] * 2
    assert dispatcher.standings()["old"][0] is None


def test_a_predictor_keeps_its_model_where_users_are_about_even():
    loads = {}
    for affinity_s in (0.0, 3.0):
        dispatcher = Dispatcher(2, affinity_s=affinity_s)
        simulation = Simulation(dispatcher, 2)
        for user in range(6):
            flood(dispatcher, f"u{user}", 100, model=f"m{user % 3}")
        loads[affinity_s] = simulation.run().loads
        assert jain(simulation.served.values()) > 0.99
    assert loads[3.0] < loads[0.0] / 1.5


def test_what_was_not_done_is_done_first_and_not_charged():
    dispatcher = Dispatcher(1)
    flood(dispatcher, "a", 3)
    first = dispatcher.next()
    dispatcher.give_back(first)
    flood(dispatcher, "b", 3)
    again = dispatcher.next()
    if again.user == "b":  # as good as a, who was not charged
        again = dispatcher.next()
    assert (again.user, again.job, again.shard) == (first.user, first.job, first.shard)
    dispatcher.complete(again, 1.0)
    dispatcher.complete(again, 1.0)  # told twice
    assert dispatcher.served_s()[again.user] == 1.0
    assert dispatcher.running + dispatcher.waiting == 5


def test_a_dropped_job_is_served_no_more():
    dispatcher = Dispatcher(2)
    job = flood(dispatcher, "a", 5)
    turn = dispatcher.next()
    dispatcher.drop_job(job)
    dispatcher.drop_job(job)
    assert dispatcher.next() is None
    dispatcher.give_back(turn)
    assert (dispatcher.waiting, dispatcher.running) == (0, 0)


def test_the_time_to_the_end_follows_share_and_speed():
    dispatcher = Dispatcher(2)
    job = flood(dispatcher, "a", 10, rows=100)
    assert dispatcher.standings()[job][1] is None
    dispatcher.learn("m", 2.0, 100)
    assert dispatcher.standings()[job][1] == pytest.approx(10.0)
    flood(dispatcher, "b", 10)
    assert dispatcher.standings()[job][1] == pytest.approx(20.0)


Events = st.lists(
    st.tuples(
        st.integers(0, 3),  # user
        st.integers(1, 6),  # shards
        st.floats(0.1, 5.0),  # seconds each
        st.floats(0.0, 8.0),  # then time passes
        st.integers(0, 2),  # model
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(
    Events, st.integers(1, 4), st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=4, max_size=4)
)
def test_every_shard_is_served_once_and_no_predictor_idles_while_anybody_waits(
    events, predictors, weights
):
    dispatcher = Dispatcher(predictors)
    takes: dict[str, float] = {}
    simulation = Simulation(dispatcher, predictors, lambda turn: takes[turn.job])
    submitted = set()
    for number, (user, shards, seconds, pause_s, model) in enumerate(events):
        job = f"j{number}"
        takes[job] = seconds
        dispatcher.set_user(f"u{user}", weights[user])
        dispatcher.add_job(job, f"u{user}", f"m{model}")
        dispatcher.add_shards(job, [(shard, 10) for shard in range(shards)])
        submitted |= {(job, shard) for shard in range(shards)}
        simulation.run(until_s=simulation.clock_s + pause_s)
        assert not (simulation.idle and dispatcher.waiting)
    simulation.run()
    served = [(turn.job, turn.shard) for _, turn in simulation.begun]
    assert len(served) == len(set(served))
    assert set(served) == submitted
    assert (dispatcher.waiting, dispatcher.running) == (0, 0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1.0, 2.0, 4.0]), st.floats(0.2, 3.0)), min_size=2, max_size=6
    ),
    st.integers(1, 3),
)
def test_users_that_always_wait_differ_by_a_bounded_time(users, predictors):
    """Served seconds over weight: apart by no more than a few shards, however long it goes on."""
    dispatcher = Dispatcher(predictors, affinity_s=0.0)
    takes = {f"u{n}": seconds for n, (_, seconds) in enumerate(users)}
    simulation = Simulation(dispatcher, predictors, lambda turn: takes[turn.user])
    for n, (weight, _) in enumerate(users):
        flood(dispatcher, f"u{n}", 2000, model=f"m{n}", weight=weight)
    simulation.run(until_s=150)
    shares = sum(weight for weight, _ in users)
    fair = [
        simulation.served[f"u{n}"] / weight
        for n, (weight, _) in enumerate(users)
        # Who has the weight for more predictors than there are shards to fill is bounded by them.
        if weight / shares * predictors <= predictors
    ]
    assert max(fair) - min(fair) <= 2 * (predictors + 1) * max(takes.values())


def test_ten_thousand_users():
    """Ten thousand users with work: some microseconds a decision, and equal shares."""
    users, predictors = 10_000, 64
    dispatcher = Dispatcher(predictors)
    for n in range(users):
        user, job = f"u{n}", f"j{n}"
        dispatcher.add_job(job, user, f"m{n % 50}")
        dispatcher.add_shards(job, [(shard, 10) for shard in range(4)])
    begin = time.perf_counter()
    served, out = Counter(), []
    loaded = itertools.cycle([{f"m{n}"} for n in range(50)])
    decisions = 20_000
    for _ in range(decisions):
        if len(out) == predictors:
            turn = out.pop(0)
            dispatcher.complete(turn, 1.0)
            served[turn.user] += 1
        out.append(dispatcher.next(next(loaded)))
    each_s = (time.perf_counter() - begin) / decisions
    counts = [served[f"u{n}"] for n in range(users)]
    assert max(counts) - min(counts) <= 2 + 2  # by affinity, some are a shard ahead
    assert each_s < 1e-3
