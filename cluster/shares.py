"""Shares: who has had how much of the cluster, and who is to have more of it next. Pure arithmetic.

Each user has a *virtual time*: the share of the cluster that the user held (the greater of the
shares of CPUs and of GPUs, as in Dominant Resource Fairness), summed over time and divided by the
user's weight. In seconds: what a user of weight 1 would have had of the whole cluster. The user who
has had least comes first. Who comes back after a pause begins where the others are: not having used
the cluster yesterday gives no right to it today.

Three things move a run from its user's place. What the user's runs hold now counts in advance, as
if they went on for `horizon_s`, so that what is free at one moment is shared out evenly. A step of
priority counts as `priority_s` of virtual time. And a run has to be ahead of a running one by
`margin_s` to take its place: no two runs replace each other in turn more often than once in twice
that time of the whole cluster.

Because all three are bounded and virtual time is not, whoever waits comes first in the end.
"""

from dataclasses import dataclass, field

from cluster.room import Shape, Worker

MOST_PRIORITY = 10  # either way: what a step moves is bounded only as the steps are


@dataclass(frozen=True)
class Policy:
    """How the cluster is shared. Seconds are of virtual time: of the whole cluster, at weight 1.

    Attributes:
        horizon_s: For how long what a user holds counts in advance.
        priority_s: What one step of priority is worth.
    """

    horizon_s: float = 300.0
    priority_s: float = 3600.0

    @property
    def margin_s(self) -> float:
        """How far ahead a waiting run must be to take a running one's place."""
        return self.horizon_s / 2


@dataclass(frozen=True)
class Terms:
    """What one user may have.

    Attributes:
        weight: Twice the weight, twice the share.
        max_cpus: Most CPUs that the user's runs hold at a time; None: no bound.
        max_gpus: Most GPUs.
        max_runs: Most runs at a time.
    """

    weight: float = 1.0
    max_cpus: float | None = None
    max_gpus: float | None = None
    max_runs: int | None = None


@dataclass
class _User:
    terms: Terms = field(default_factory=Terms)
    virtual_s: float = 0.0
    cpus: float = 0.0
    gpus: float = 0.0
    holding: int = 0
    waiting: int = 0

    @property
    def is_active(self) -> bool:
        return self.holding + self.waiting > 0


class Shares:
    """The users of one cluster. Times are seconds of any one clock; one that goes back stands."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._users: dict[str, _User] = {}
        self._total = Worker(1.0, 0.0)
        self._at: float | None = None

    def charge(self, now: float) -> None:
        """Count what everybody held since the last call."""
        elapsed_s = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        if not elapsed_s:
            return
        for user in self._users.values():
            if user.holding:
                user.virtual_s += self._held(user) * elapsed_s / user.terms.weight

    def set_total(self, total: Worker) -> None:
        """Say how much the whole cluster has. Call `charge` before."""
        self._total = total

    def set_terms(self, name: str, terms: Terms) -> None:
        """Say what a user may have. Call `charge` before."""
        self._user(name).terms = terms

    def terms(self, name: str) -> Terms:
        """What a user may have."""
        return self._user(name).terms

    def virtual_times(self) -> dict[str, float]:
        """What each user has had, at the time of the last `charge`."""
        return {name: user.virtual_s for name, user in self._users.items()}

    def restore(self, virtual_times: dict[str, float]) -> None:
        """What each user had before this object was made."""
        for name, virtual_s in virtual_times.items():
            self._user(name).virtual_s = virtual_s

    def holds(self, name: str) -> tuple[float, float, int]:
        """CPUs, GPUs and runs that a user holds."""
        user = self._user(name)
        return user.cpus, user.gpus, user.holding

    def wait(self, name: str, runs: int = 1) -> None:
        """A run of the user's waits; -1: one waits no longer."""
        user = self._user(name)
        if not user.is_active and runs > 0:
            active = [other.virtual_s for other in self._users.values() if other.is_active]
            user.virtual_s = max(user.virtual_s, min(active, default=user.virtual_s))
        user.waiting += runs

    def hold(self, name: str, shape: Shape, runs: int = 1) -> None:
        """A run of the user's begins to hold what it asks for; -1: it holds it no longer."""
        user = self._user(name)
        user.holding += runs
        user.cpus += runs * shape.cpus
        user.gpus += runs * shape.gpus
        if not user.holding:
            user.cpus = user.gpus = 0.0  # no dust of roundings

    def key(
        self, name: str, priority: int, more: float = 0.0, without: Shape | None = None
    ) -> float:
        """Where a run of this user and priority stands: the least comes first, in virtual seconds.

        Args:
            name: The user.
            priority: Of the run.
            more: Share of the cluster that counts as held besides.
            without: A run of the user's that counts as not held: where it would stand, waiting.
        """
        user = self._user(name)
        share = self._held(user, without) + more
        # A step of priority is worth the same to everybody, whatever the weight.
        ahead_s = self.policy.horizon_s * share / user.terms.weight
        return user.virtual_s + ahead_s - self.policy.priority_s * priority

    def share(self, shape: Shape) -> float:
        """The share of the cluster that a run takes, as far as it alone counts."""
        return self._dominant(shape.cpus, shape.gpus)

    def over_quota(self, name: str, shape: Shape) -> str:
        """Which bound of the user's a further run would break, as a phrase; nothing where none."""
        user = self._user(name)
        terms = user.terms
        for unit, most, held, asked in (
            ("CPUs", terms.max_cpus, user.cpus, shape.cpus),
            ("GPUs", terms.max_gpus, user.gpus, shape.gpus),
            ("runs", terms.max_runs, user.holding, 1),
        ):
            if most is not None and held + asked > most + 1e-6:
                return f"{name} holds {held:g} of at most {most:g} {unit}, this asks for {asked:g}"
        return ""

    def _held(self, user: _User, without: Shape | None = None) -> float:
        cpus, gpus = user.cpus, user.gpus
        if without is not None:
            cpus, gpus = cpus - without.cpus, gpus - without.gpus
        return self._dominant(cpus, gpus)

    def _dominant(self, cpus: float, gpus: float) -> float:
        share = cpus / self._total.cpus if self._total.cpus else 0.0
        return max(share, gpus / self._total.gpus if self._total.gpus else 0.0, 0.0)

    def _user(self, name: str) -> _User:
        user = self._users.get(name)
        if user is None:
            user = self._users[name] = _User()
        return user
