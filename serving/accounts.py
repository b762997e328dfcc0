"""Who may ask the service for what: users, keys, roles, quotas, grants, and an audit of changes.

Owns what a key is and how it is kept. A key is `lk_ID_SECRET`: the id finds its row, the secret is
256 random bits. Kept is the SHA-256 of the whole key. A slow password hash would add nothing (there
is no dictionary of random secrets to try) and would cost each request what it costs a thief.

A found account is remembered for a second at most, so a revoked key, a smaller quota or a
withdrawn grant is in force everywhere a second later; in the process that changed it, at once.
Every change leaves a line in the audit, in the same transaction.
"""

import hashlib
import hmac
import math
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa

from configs.errors import did_you_mean
from registry.database import Database
from serving.account_tables import (
    AUDIT,
    COMPONENT,
    GRANTS,
    INPUTS,
    KEYS,
    RESTRICTED,
    USAGE,
    USERS,
)
from serving.account_types import (
    DAY_S,
    PUBLIC,
    Account,
    AuditLine,
    Quotas,
    Role,
    UserRecord,
    account_of_row,
    check_account,
    rows_exceeded,
)
from serving.errors import AccountError, AuthenticationError

__all__ = ["PUBLIC", "Account", "Accounts", "AuditLine", "Quotas", "Role", "UserRecord"]

CACHE_S = 1.0
"""The longest time for which a change made by another process is not seen."""

_CACHED_KEYS = 20_000
_KEY = re.compile(r"lk_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")


class Accounts:
    """The users of a database. Safe to share between threads.

    Args:
        database: Where they are kept; the tables are made where they are missing.
        clock: Seconds since 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        database.prepare(COMPONENT)
        self._database = database
        self._clock = clock
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, tuple[float, Account]] = OrderedDict()
        self._restricted: tuple[float, frozenset[str]] = (-math.inf, frozenset())

    # -- what requests ask --------------------------------------------------------------------

    def cached(self, key: str) -> Account | None:
        """The account of a key that was found less than a second ago, without the database."""
        found = self._cache.get(_digest(key))
        if found is None or not 0 <= self._clock() - found[0] < CACHE_S:
            return None
        return found[1]

    def authenticate(self, key: str) -> Account:
        """The account of a key.

        Raises:
            AuthenticationError: The key is unknown, expired or revoked; the message holds no part
                of it and does not tell which.
            DatabaseFailure: The database failed.
        """
        account = self.cached(key)
        if account is not None:
            return account
        shape = _KEY.fullmatch(key)
        if shape is None:
            raise _refused()
        now = self._clock()
        with self._database.reading() as connection:
            row = connection.execute(
                sa.select(KEYS.c.digest, KEYS.c.expires_at, USERS)
                .join(USERS, USERS.c.name == KEYS.c.user_name)
                .where(KEYS.c.id == shape.group(1))
            ).one_or_none()
            if row is None or not hmac.compare_digest(row.digest, _digest(key).hex()):
                raise _refused()
            if row.expires_at is not None and row.expires_at <= now:
                raise _refused()
            account = account_of_row(row, self._granted(connection, row.name))
        with self._lock:
            self._cache[_digest(key)] = (now, account)
            while len(self._cache) > _CACHED_KEYS:
                self._cache.popitem(last=False)
        return account

    def account(self, user: str) -> Account:
        """The account of a user as it is now, for work that goes on without a request.

        Raises:
            AccountError: There is no such user.
        """
        with self._database.reading() as connection:
            row = self._user(connection, user)
            return account_of_row(row, self._granted(connection, user))

    def may_use(self, account: Account, model_name: str) -> bool:
        """Whether a user may know of a model and predict with it; at most a second old."""
        now = self._clock()
        read_at, restricted = self._restricted
        if not 0 <= now - read_at < CACHE_S:
            with self._database.reading() as connection:
                restricted = frozenset(connection.execute(sa.select(RESTRICTED.c.model)).scalars())
            self._restricted = (now, restricted)
        return (
            account.role == "admin" or model_name not in restricted or model_name in account.granted
        )

    def charge_rows(self, user: str, rows: int, is_forced: bool = False) -> None:
        """Count rows against the user's quota of the day, all of them or none.

        Args:
            user: Who pays; rows of a user who was removed are not counted.
            rows: How many.
            is_forced: Count them whatever the quota says: they were computed already.

        Raises:
            QuotaExceeded: The quota does not hold so many more rows today.
        """
        with self._database.writing(COMPONENT.name) as connection:
            self.charge_rows_in(connection, user, rows, is_forced)

    def charge_rows_in(
        self, connection: sa.Connection, user: str, rows: int, is_forced: bool = False
    ) -> None:
        """As `charge_rows`, in a transaction that something else is a part of."""
        now = self._clock()
        day = int(now // DAY_S)
        of_day = (USAGE.c.user_name == user) & (USAGE.c.day == day)
        limit = connection.execute(
            sa.select(USERS.c.rows_per_day).where(USERS.c.name == user)
        ).one_or_none()
        if limit is None:
            return
        used = connection.execute(sa.select(USAGE.c.row_count).where(of_day)).scalar()
        if limit[0] is not None and (used or 0) + rows > limit[0] and not is_forced:
            raise rows_exceeded(limit[0], used or 0, rows, now)
        if used is None:
            connection.execute(USAGE.insert().values(user_name=user, day=day, row_count=rows))
        else:
            connection.execute(USAGE.update().where(of_day).values(row_count=used + rows))

    def rows_today(self, user: str) -> int:
        """Rows charged in the present day of UTC."""
        day = int(self._clock() // DAY_S)
        with self._database.reading() as connection:
            return self._rows(connection, user, day)

    def allowed_inputs(self, user: str) -> list[str]:
        """URI prefixes from which the user's batch jobs may read; none by default."""
        with self._database.reading() as connection:
            found = connection.execute(
                sa.select(INPUTS.c.prefix).where(INPUTS.c.user_name == user).order_by("prefix")
            )
            return list(found.scalars())

    # -- what an operator changes -------------------------------------------------------------

    def add(
        self,
        user: str,
        *,
        who: str,
        role: Role = "user",
        weight: float = 1.0,
        quotas: Quotas | None = None,
    ) -> str:
        """Make a user.

        Returns:
            The key, which is kept nowhere.

        Raises:
            AccountError: The name is taken, was taken before, or is not allowed, or the weight or
                a quota is not.
        """
        quotas = quotas or Quotas()
        check_account(user, role, weight, quotas)
        with self._changing(who, "add", user, f"role={role} weight={weight:g}") as connection:
            if connection.execute(sa.select(USERS.c.name).where(USERS.c.name == user)).first():
                raise AccountError(
                    f"there is a user {user!r} already; a new name is allowed. Choose another, or "
                    f"give {user!r} a new key: lockstep users rotate {user}."
                )
            removed = (AUDIT.c.action == "remove") & (AUDIT.c.subject == user)
            if connection.execute(sa.select(AUDIT.c.sequence).where(removed)).first():
                raise AccountError(
                    f"there was a user {user!r}, whose files and jobs would be seen by a new one; "
                    "a name that nobody had is allowed. Choose another."
                )
            connection.execute(
                USERS.insert().values(
                    name=user,
                    role=role,
                    weight=weight,
                    created_at=self._clock(),
                    **asdict(quotas),
                )
            )
            return self._new_key(connection, user)

    def rotate(self, user: str, *, who: str, grace_s: float = 0.0) -> str:
        """Give a user a new key; the old ones work for `grace_s` seconds more.

        Returns:
            The key, which is kept nowhere.

        Raises:
            AccountError: There is no such user, or the grace is negative.
        """
        if not 0 <= grace_s < math.inf:
            raise AccountError(f"--grace received {grace_s:g}; 0 seconds or more are allowed.")
        with self._changing(who, "rotate", user, f"grace_s={grace_s:g}") as connection:
            self._user(connection, user)
            old = KEYS.c.user_name == user
            if grace_s:
                until = self._clock() + grace_s
                longer = KEYS.c.expires_at.is_(None) | (KEYS.c.expires_at > until)
                connection.execute(KEYS.update().where(old & longer).values(expires_at=until))
            else:
                connection.execute(KEYS.delete().where(old))
            return self._new_key(connection, user)

    def revoke(self, user: str, *, who: str, key_id: str | None = None) -> int:
        """Take one key, or all of them, from a user; returns how many.

        Raises:
            AccountError: There is no such user, or no such key of that user.
        """
        with self._changing(who, "revoke", user, f"key={key_id or 'all'}") as connection:
            self._user(connection, user)
            wanted = KEYS.c.user_name == user
            if key_id is not None:
                wanted &= KEYS.c.id == key_id
            revoked = connection.execute(KEYS.delete().where(wanted)).rowcount
            if key_id is not None and not revoked:
                raise AccountError(
                    f"{user!r} has no key {key_id!r}; an id of `lockstep users list` is allowed."
                )
            return revoked

    def remove(self, user: str, *, who: str) -> None:
        """Take a user away with keys, grants and allowed inputs; the audit stays.

        The name is never given again, as files and jobs are kept by it.

        Raises:
            AccountError: There is no such user.
        """
        with self._changing(who, "remove", user, "") as connection:
            self._user(connection, user)
            for table in (KEYS, GRANTS, INPUTS, USAGE):
                connection.execute(table.delete().where(table.c.user_name == user))
            connection.execute(USERS.delete().where(USERS.c.name == user))

    def change(
        self,
        user: str,
        *,
        who: str,
        role: Role | None = None,
        weight: float | None = None,
        quotas: dict[str, float | None] | None = None,
    ) -> Account:
        """Change a user's role, weight, or some quotas; what is not named stays.

        Returns:
            The account as it is now.

        Raises:
            AccountError: There is no such user, or a value is not allowed.
        """
        values: dict[str, Any] = dict(quotas or {})
        values |= {"role": role} if role is not None else {}
        values |= {"weight": weight} if weight is not None else {}
        detail = " ".join(f"{name}={value}" for name, value in values.items())
        with self._changing(who, "change", user, detail) as connection:
            before = account_of_row(self._user(connection, user), frozenset())
            changed = replace(before.quotas, **(quotas or {}))  # type: ignore[arg-type]
            check_account(
                user, role or before.role, before.weight if weight is None else weight, changed
            )
            if values:
                connection.execute(USERS.update().where(USERS.c.name == user).values(**values))
            return account_of_row(self._user(connection, user), self._granted(connection, user))

    def grant(self, grantee: str, model: str, *, who: str) -> None:
        """Let a user, or everybody (`public`), use a model. Idempotent.

        Raises:
            AccountError: There is no such user.
        """
        with self._changing(who, "grant", grantee, model) as connection:
            if grantee == PUBLIC:
                connection.execute(RESTRICTED.delete().where(RESTRICTED.c.model == model))
                return
            self._user(connection, grantee)
            mine = (GRANTS.c.user_name == grantee) & (GRANTS.c.model == model)
            connection.execute(GRANTS.delete().where(mine))
            connection.execute(GRANTS.insert().values(user_name=grantee, model=model))

    def withdraw(self, grantee: str, model: str, *, who: str) -> None:
        """Take a grant back; from `public`: only users with a grant of their own keep the model.

        Raises:
            AccountError: There is no such user.
        """
        with self._changing(who, "withdraw", grantee, model) as connection:
            if grantee == PUBLIC:
                connection.execute(RESTRICTED.delete().where(RESTRICTED.c.model == model))
                connection.execute(RESTRICTED.insert().values(model=model))
                return
            self._user(connection, grantee)
            mine = (GRANTS.c.user_name == grantee) & (GRANTS.c.model == model)
            connection.execute(GRANTS.delete().where(mine))

    def allow_input(self, user: str, prefix: str, *, who: str) -> None:
        """Let the user's batch jobs read below a folder or URI. Idempotent.

        Raises:
            AccountError: There is no such user.
        """
        with self._changing(who, "allow-input", user, prefix) as connection:
            self._user(connection, user)
            mine = (INPUTS.c.user_name == user) & (INPUTS.c.prefix == prefix)
            connection.execute(INPUTS.delete().where(mine))
            connection.execute(INPUTS.insert().values(user_name=user, prefix=prefix))

    def forbid_input(self, user: str, prefix: str, *, who: str) -> None:
        """Take back what `allow_input` gave. Idempotent.

        Raises:
            AccountError: There is no such user.
        """
        with self._changing(who, "forbid-input", user, prefix) as connection:
            self._user(connection, user)
            mine = (INPUTS.c.user_name == user) & (INPUTS.c.prefix == prefix)
            connection.execute(INPUTS.delete().where(mine))

    def audit(self, who: str, action: str, subject: str, detail: str = "") -> None:
        """Write a line into the audit. Never give it a key."""
        with self._database.writing(COMPONENT.name) as connection:
            self._audit(connection, who, action, subject, detail)

    def audit_lines(self, most: int = 1_000) -> list[AuditLine]:
        """The newest lines of the audit, oldest of them first."""
        with self._database.reading() as connection:
            newest = sa.select(AUDIT).order_by(AUDIT.c.sequence.desc()).limit(most)
            return [AuditLine(*row) for row in reversed(connection.execute(newest).all())]

    def users(self) -> list[UserRecord]:
        """All users by name."""
        now = self._clock()
        records = []
        with self._database.reading() as connection:
            for row in connection.execute(sa.select(USERS).order_by(USERS.c.name)).all():
                of_user = KEYS.c.user_name == row.name
                works = KEYS.c.expires_at.is_(None) | (KEYS.c.expires_at > now)
                keys = connection.execute(
                    sa.select(KEYS.c.id, KEYS.c.expires_at)
                    .where(of_user & works)
                    .order_by(KEYS.c.created_at)
                )
                inputs = connection.execute(
                    sa.select(INPUTS.c.prefix).where(INPUTS.c.user_name == row.name)
                )
                records.append(
                    UserRecord(
                        account_of_row(row, self._granted(connection, row.name)),
                        row.created_at,
                        tuple((key.id, key.expires_at) for key in keys),
                        tuple(sorted(inputs.scalars())),
                        self._rows(connection, row.name, int(now // DAY_S)),
                    )
                )
        return records

    # -- within -------------------------------------------------------------------------------

    @contextmanager
    def _changing(
        self, who: str, action: str, subject: str, detail: str
    ) -> Iterator[sa.Connection]:
        with self._database.writing(COMPONENT.name) as connection:
            yield connection
            self._audit(connection, who, action, subject, detail)
        with self._lock:
            self._cache.clear()
            self._restricted = (-math.inf, frozenset())

    def _audit(
        self, connection: sa.Connection, who: str, action: str, subject: str, detail: str
    ) -> None:
        connection.execute(
            AUDIT.insert().values(
                at=self._clock(), who=who, action=action, subject=subject, detail=detail
            )
        )

    def _new_key(self, connection: sa.Connection, user: str) -> str:
        key_id = secrets.token_hex(6)
        key = f"lk_{key_id}_{secrets.token_urlsafe(32)}"
        connection.execute(
            KEYS.insert().values(
                id=key_id,
                user_name=user,
                digest=_digest(key).hex(),
                created_at=self._clock(),
                expires_at=None,
            )
        )
        return key

    def _user(self, connection: sa.Connection, user: str) -> Any:
        row = connection.execute(sa.select(USERS).where(USERS.c.name == user)).one_or_none()
        if row is None:
            known = list(connection.execute(sa.select(USERS.c.name)).scalars())
            raise AccountError(
                f"there is no user {user!r}; a name of `lockstep users list` is allowed."
                f"{did_you_mean(user, known)}"
            )
        return row

    @staticmethod
    def _granted(connection: sa.Connection, user: str) -> frozenset[str]:
        mine = sa.select(GRANTS.c.model).where(GRANTS.c.user_name == user)
        return frozenset(connection.execute(mine).scalars())

    @staticmethod
    def _rows(connection: sa.Connection, user: str, day: int) -> int:
        of_day = (USAGE.c.user_name == user) & (USAGE.c.day == day)
        return connection.execute(sa.select(USAGE.c.row_count).where(of_day)).scalar() or 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _refused() -> AuthenticationError:
    return AuthenticationError(
        "the API key is unknown, expired or revoked; a key of `lockstep users add` is allowed, as "
        "`Authorization: Bearer lk_...`. Ask the operator of this service for a key."
    )
