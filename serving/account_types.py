"""What is known of a user: role, weight, quotas, grants; and what may be set."""

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, cast, get_args

from serving.errors import AccountError, QuotaExceeded

Role = Literal["user", "admin"]

PUBLIC = "public"
"""The grantee that stands for every user; each model is granted to it until that is withdrawn."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
DAY_S = 86_400


@dataclass(frozen=True)
class Quotas:
    """A user's limits; None is no limit.

    Attributes:
        queued_jobs: Batch jobs that are not finished.
        rows_per_day: Rows predicted, online and in batch jobs, in a day of UTC.
        bytes: Bytes of stored uploads and outputs.
        requests_per_s: Requests a second; short bursts up to one second's worth pass.
        concurrent_shards: Shards of batch jobs that run at the same time.
    """

    queued_jobs: int | None = None
    rows_per_day: int | None = None
    bytes: int | None = None
    requests_per_s: float | None = None
    concurrent_shards: int | None = None


@dataclass(frozen=True)
class Account:
    """Whom a key belongs to.

    Attributes:
        user: The user's name.
        role: An admin uses every model and sees everybody's jobs.
        weight: Share of the machine in relation to other users' weights.
        quotas: The user's limits.
        granted: Restricted models that the user may use.
    """

    user: str
    role: Role
    weight: float
    quotas: Quotas
    granted: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class UserRecord:
    """What `lockstep users list` shows.

    Attributes:
        account: The user.
        created_at: Seconds since 1970.
        keys: Id and expiry (seconds since 1970, None: none) of each key that works.
        inputs: URI prefixes that batch jobs of the user may read.
        rows_today: Rows charged today.
    """

    account: Account
    created_at: float
    keys: tuple[tuple[str, float | None], ...]
    inputs: tuple[str, ...]
    rows_today: int


@dataclass(frozen=True)
class AuditLine:
    """One change: who did what to whom, when."""

    sequence: int
    at: float
    who: str
    action: str
    subject: str
    detail: str


def rows_exceeded(limit: int, used: int, rows: int, now: float) -> QuotaExceeded:
    """The refusal of rows that today's quota does not hold; it is lifted at midnight UTC."""
    return QuotaExceeded(
        f"received {rows} rows; {max(0, limit - used)} more are allowed today: the quota is "
        f"{limit} rows a day. Send them after midnight UTC, or ask for a greater quota.",
        "rows_per_day",
        DAY_S - now % DAY_S,
    )


def account_of_row(row: Any, granted: frozenset[str]) -> Account:
    """The account in a row of the table of users."""
    quotas = Quotas(**{quota.name: getattr(row, quota.name) for quota in fields(Quotas)})
    return Account(row.name, cast("Role", row.role), row.weight, quotas, granted)


def check_account(user: str, role: str, weight: float, quotas: Quotas) -> None:
    """Raises AccountError for a name or a value that is not allowed."""
    if not _NAME.fullmatch(user) or user == PUBLIC:
        raise AccountError(
            f"received the name {user!r}; 1 to 64 letters, digits and . _ @ -, the first a letter "
            f"or digit, are allowed, but not {PUBLIC!r}, which stands for everybody."
        )
    if role not in get_args(Role):
        raise AccountError(f"received the role {role!r}; {', '.join(get_args(Role))} are allowed.")
    if not 0 < weight < math.inf:
        raise AccountError(f"received the weight {weight:g}; more than 0 is allowed.")
    for name, limit in asdict(quotas).items():
        if limit is not None and not 0 <= limit < math.inf:
            raise AccountError(
                f"received {name}={limit:g}; 0 or more is allowed, or none for no limit."
            )
