"""What a user may ask for now: requests a second, and rows a day, without a database per request.

Owns the counting in this process. Requests a second are a bucket of tokens of one second's worth.
Rows are charged to a local count that is settled with the database once a second; with several
processes a user can exceed the day's rows by what was sent within that second.
"""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from registry.errors import DatabaseFailure
from serving.account_types import rows_exceeded
from serving.accounts import Account, Accounts
from serving.errors import QuotaExceeded

_MOST_USERS = 100_000


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class RequestRates:
    """Requests a second by user, in this process.

    Requests are spread evenly among the processes of the service, and each admits its part. How
    many there are changes with the load: who counts them says so with `share_among`.

    Args:
        processes: How many there are now.
        monotonic: Seconds.
    """

    def __init__(self, processes: int = 1, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._processes = processes
        self._monotonic = monotonic
        self._buckets: dict[str, _Bucket] = {}

    @property
    def processes(self) -> int:
        """Among how many processes the requests are spread, as far as is known."""
        return self._processes

    def share_among(self, processes: int) -> None:
        """Admit the part of one among so many processes from now on."""
        self._processes = max(1, processes)

    def admit(self, account: Account) -> None:
        """Take a token.

        Raises:
            QuotaExceeded: There is none; it says when there will be.
        """
        limit = account.quotas.requests_per_s
        if limit is None:
            return
        rate = limit / self._processes
        most = max(1.0, rate)
        now = self._monotonic()
        bucket = self._buckets.get(account.user)
        if bucket is None:
            if len(self._buckets) >= _MOST_USERS:
                self._buckets.clear()
            bucket = self._buckets[account.user] = _Bucket(most, now)
        bucket.tokens = min(most, bucket.tokens + (now - bucket.filled_at) * rate)
        bucket.filled_at = now
        if bucket.tokens < 1.0:
            wait_s = (1.0 - bucket.tokens) / rate if rate else 3_600.0
            raise QuotaExceeded(
                f"{limit:g} requests a second are allowed. Send the next one in "
                f"{max(wait_s, 0.01):.2g} s, or put more rows into each.",
                "requests_per_s",
                wait_s,
            )
        bucket.tokens -= 1.0


@dataclass(slots=True)
class _Meter:
    settled: int
    pending: int
    day: int


class RowMeter:
    """Rows of online requests by user.

    Args:
        accounts: Where they are settled.
        clock: Seconds since 1970.
    """

    def __init__(self, accounts: Accounts, clock: Callable[[], float] = time.time) -> None:
        self._accounts = accounts
        self._clock = clock
        self._meters: dict[str, _Meter] = {}

    def charge(self, account: Account, rows: int) -> None:
        """Count rows that are about to be computed.

        Raises:
            QuotaExceeded: Today's quota does not hold them, as far as this process knows.
        """
        now = self._clock()
        day = int(now // 86_400)
        meter = self._meters.get(account.user)
        if meter is None or meter.day != day:
            pending = meter.pending if meter else 0
            meter = self._meters[account.user] = _Meter(0, pending, day)
        limit = account.quotas.rows_per_day
        used = meter.settled + meter.pending
        if limit is not None and used + rows > limit:
            raise rows_exceeded(limit, used, rows, now)
        meter.pending += rows

    def give_back(self, account: Account, rows: int) -> None:
        """Take back what was counted for a request that was refused."""
        meter = self._meters.get(account.user)
        if meter is not None:
            meter.pending -= rows

    def knows(self, user: str) -> bool:
        """Whether the user's settled rows of today are known here."""
        meter = self._meters.get(user)
        return meter is not None and meter.day == int(self._clock() // 86_400)

    def learn(self, user: str, rows_today: int) -> None:
        """Take over what the database has of a user's rows of today."""
        day = int(self._clock() // 86_400)
        meter = self._meters.setdefault(user, _Meter(0, 0, day))
        meter.settled, meter.day = rows_today, day

    async def settle(self) -> None:
        """Charge what is pending, and learn what other processes charged; in threads.

        Raises:
            DatabaseFailure: The rest is charged the next time.
        """
        for user, meter in list(self._meters.items()):
            rows, meter.pending = meter.pending, 0
            meter.settled += rows
            try:
                if rows:
                    await asyncio.to_thread(self._accounts.charge_rows, user, rows, True)
                meter.settled = await asyncio.to_thread(self._accounts.rows_today, user)
            except DatabaseFailure:
                meter.pending += rows
                meter.settled -= rows
                raise
            if not rows and not meter.pending:
                self._meters.pop(user, None)  # learnt anew with the user's next request


def retry_after(seconds: float | None) -> str:
    """A wait as the header Retry-After says it: whole seconds, one at least."""
    return str(max(1, math.ceil(seconds or 0.0)))
