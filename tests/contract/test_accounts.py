"""Users, keys, grants and quotas, on both databases."""

import threading

import pytest

from configs.errors import UserError
from registry.database import Database
from serving.accounts import PUBLIC, Account, Accounts, Quotas
from serving.errors import AccountError, AuthenticationError, QuotaExceeded
from tests.support.clock import Clock


@pytest.fixture
def accounts(database: Database, clock: Clock) -> Accounts:
    return Accounts(database, clock)


def other_process(database: Database, clock: Clock) -> Accounts:
    """Accounts that share nothing with the fixture's but the database."""
    return Accounts(database, clock)


def test_a_key_leads_to_its_user(accounts: Accounts) -> None:
    key = accounts.add("ana", who="op", role="admin", weight=2.0, quotas=Quotas(queued_jobs=3))
    assert accounts.authenticate(key) == Account("ana", "admin", 2.0, Quotas(queued_jobs=3))
    assert accounts.account("ana") == accounts.authenticate(key)


def test_a_key_is_kept_nowhere(accounts: Accounts, database: Database) -> None:
    key = accounts.add("ana", who="op")
    secret = key.split("_", 2)[2]
    from serving.account_tables import COMPONENT

    with database.reading() as connection:
        rows = [
            str(tuple(row))
            for table in COMPONENT.tables.sorted_tables
            for row in connection.execute(table.select())
        ]
    assert len(rows) == 3  # the user, the key, the line of the audit
    assert not any(secret in row for row in rows)


def test_anything_else_is_refused_alike(accounts: Accounts) -> None:
    key = accounts.add("ana", who="op")
    others = [
        *("", "lk_", key[:-1], key + "x", key.upper(), "lk_000000000000" + key[15:]),
        *(key[:-1] + ("A" if key[-1] != "A" else "B"), "\udce4" + key, "' OR 1=1 --"),
    ]
    for other in others:
        with pytest.raises(AuthenticationError, match="unknown, expired or revoked") as refused:
            accounts.authenticate(other)
        assert refused.value.status == 401
        assert key.split("_", 2)[2] not in str(refused.value)


def test_revocation_is_at_once_here_and_within_a_second_elsewhere(
    accounts: Accounts, clock: Clock, database: Database
) -> None:
    key = accounts.add("ana", who="op")
    elsewhere = other_process(database, clock)
    assert elsewhere.authenticate(key) == accounts.authenticate(key)
    assert accounts.revoke("ana", who="op") == 1
    with pytest.raises(AuthenticationError):
        accounts.authenticate(key)
    clock.now += 1.0
    assert elsewhere.cached(key) is None
    with pytest.raises(AuthenticationError):
        elsewhere.authenticate(key)


def test_found_accounts_are_remembered_without_the_database(
    accounts: Accounts, clock: Clock
) -> None:
    key = accounts.add("ana", who="op")
    assert accounts.cached(key) is None
    accounts.authenticate(key)
    clock.now += 0.9
    assert accounts.cached(key) is not None
    clock.now -= 5  # a clock set back must not keep a key alive
    assert accounts.cached(key) is None


def test_rotation_with_and_without_grace(accounts: Accounts, clock: Clock) -> None:
    first = accounts.add("ana", who="op")
    second = accounts.rotate("ana", who="op", grace_s=60)
    assert accounts.authenticate(first) == accounts.authenticate(second)
    clock.now += 61
    with pytest.raises(AuthenticationError):
        accounts.authenticate(first)
    third = accounts.rotate("ana", who="op")
    with pytest.raises(AuthenticationError):
        accounts.authenticate(second)
    assert accounts.authenticate(third).user == "ana"


def test_a_second_rotation_does_not_lengthen_the_first_ones_grace(
    accounts: Accounts, clock: Clock
) -> None:
    first = accounts.add("ana", who="op")
    accounts.rotate("ana", who="op", grace_s=10)
    accounts.rotate("ana", who="op", grace_s=1_000)
    clock.now += 11
    with pytest.raises(AuthenticationError):
        accounts.authenticate(first)


def test_one_key_of_several_can_be_revoked(accounts: Accounts) -> None:
    first = accounts.add("ana", who="op")
    second = accounts.rotate("ana", who="op", grace_s=60)
    accounts.revoke("ana", who="op", key_id=first.split("_")[1])
    with pytest.raises(AuthenticationError):
        accounts.authenticate(first)
    assert accounts.authenticate(second).user == "ana"
    with pytest.raises(AccountError, match="no key 'ffff'"):
        accounts.revoke("ana", who="op", key_id="ffff")


def test_a_removed_user_is_gone_and_the_audit_stays(accounts: Accounts) -> None:
    key = accounts.add("ana", who="op")
    accounts.allow_input("ana", "s3://bucket/ana/", who="op")
    accounts.remove("ana", who="op")
    with pytest.raises(AuthenticationError):
        accounts.authenticate(key)
    assert accounts.users() == []
    assert accounts.allowed_inputs("ana") == []
    assert [(line.action, line.subject) for line in accounts.audit_lines()] == [
        ("add", "ana"),
        ("allow-input", "ana"),
        ("remove", "ana"),
    ]
    with pytest.raises(AccountError, match="a name that nobody had"):
        accounts.add("ana", who="op")  # files and jobs of the first one are kept by name
    assert accounts.users() == []
    assert accounts.add("anna", who="op")


def test_every_change_leaves_one_line_and_a_refused_one_none(accounts: Accounts) -> None:
    accounts.add("ana", who="op@host")
    accounts.rotate("ana", who="op@host", grace_s=5)
    accounts.change("ana", who="op@host", weight=3.0, quotas={"queued_jobs": 1})
    accounts.grant("ana", "m", who="op@host")
    accounts.withdraw(PUBLIC, "m", who="op@host")
    accounts.revoke("ana", who="op@host")
    with pytest.raises(AccountError):
        accounts.rotate("bob", who="op@host")
    lines = accounts.audit_lines()
    assert [line.action for line in lines] == [
        *("add", "rotate", "change", "grant", "withdraw", "revoke")
    ]
    assert [line.sequence for line in lines] == sorted({line.sequence for line in lines})
    assert {line.who for line in lines} == {"op@host"}
    assert lines[2].detail == "queued_jobs=1 weight=3.0"


def test_models_are_public_until_that_is_withdrawn(accounts: Accounts) -> None:
    ana = accounts.authenticate(accounts.add("ana", who="op"))
    bob_key = accounts.add("bob", who="op")
    root = accounts.authenticate(accounts.add("root", who="op", role="admin"))
    assert accounts.may_use(ana, "secret")
    accounts.withdraw(PUBLIC, "secret", who="op")
    accounts.grant("bob", "secret", who="op")
    bob = accounts.authenticate(bob_key)
    assert not accounts.may_use(ana, "secret")
    assert accounts.may_use(bob, "secret")
    assert accounts.may_use(root, "secret")
    assert accounts.may_use(ana, "other")
    accounts.withdraw("bob", "secret", who="op")
    assert not accounts.may_use(accounts.authenticate(bob_key), "secret")
    accounts.grant(PUBLIC, "secret", who="op")
    assert accounts.may_use(ana, "secret")


def test_a_withdrawn_grant_is_seen_by_others_within_a_second(
    accounts: Accounts, clock: Clock, database: Database
) -> None:
    key = accounts.add("ana", who="op")
    elsewhere = other_process(database, clock)
    assert elsewhere.may_use(elsewhere.authenticate(key), "m")
    accounts.withdraw(PUBLIC, "m", who="op")
    clock.now += 1.0
    assert not elsewhere.may_use(elsewhere.authenticate(key), "m")


def test_rows_are_charged_whole_and_forgiven_at_midnight(accounts: Accounts, clock: Clock) -> None:
    clock.now = 10 * 86_400 + 86_000.0
    accounts.add("ana", who="op", quotas=Quotas(rows_per_day=100))
    accounts.charge_rows("ana", 60)
    with pytest.raises(QuotaExceeded, match="40 more are allowed") as exceeded:
        accounts.charge_rows("ana", 41)
    assert exceeded.value.code == "rows_per_day"
    assert exceeded.value.retry_after_s == 400
    accounts.charge_rows("ana", 40)
    assert accounts.rows_today("ana") == 100
    accounts.charge_rows("ana", 7, is_forced=True)
    assert accounts.users()[0].rows_today == 107
    clock.now += 400
    accounts.charge_rows("ana", 100)
    accounts.charge_rows("nobody", 5)
    assert accounts.rows_today("nobody") == 0


def test_charges_of_several_threads_add_up(accounts: Accounts) -> None:
    accounts.add("ana", who="op", quotas=Quotas(rows_per_day=50))
    refused = []

    def charge() -> None:
        for _ in range(10):
            try:
                accounts.charge_rows("ana", 2)
            except QuotaExceeded:
                refused.append(1)

    threads = [threading.Thread(target=charge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert accounts.rows_today("ana") == 50
    assert len(refused) == 15


def test_quotas_and_weight_change_alone(accounts: Accounts) -> None:
    key = accounts.add("ana", who="op", quotas=Quotas(queued_jobs=3, bytes=10))
    accounts.change("ana", who="op", quotas={"bytes": None, "requests_per_s": 2.5})
    assert accounts.authenticate(key).quotas == Quotas(queued_jobs=3, requests_per_s=2.5)
    assert accounts.change("ana", who="op", weight=4).weight == 4
    assert accounts.account("ana").quotas == Quotas(queued_jobs=3, requests_per_s=2.5)


MISTAKES = [
    (lambda a: a.add("ana", who="op"), "already"),
    (lambda a: a.add("public", who="op"), "stands for everybody"),
    (lambda a: a.add("../x", who="op"), "received the name '../x'"),
    (lambda a: a.add("", who="op"), "letters, digits"),
    (lambda a: a.add("bob", who="op", weight=0.0), "more than 0"),
    (lambda a: a.add("bob", who="op", weight=float("nan")), "more than 0"),
    (lambda a: a.add("bob", who="op", role="god"), "user, admin are allowed"),
    (lambda a: a.add("bob", who="op", quotas=Quotas(bytes=-1)), "bytes=-1"),
    (lambda a: a.rotate("anna", who="op"), "Did you mean 'ana'"),
    (lambda a: a.rotate("ana", who="op", grace_s=-1), "0 seconds or more"),
    (lambda a: a.grant("anna", "m", who="op"), "Did you mean 'ana'"),
    (lambda a: a.change("ana", who="op", quotas={"queued_jobs": -2}), "queued_jobs=-2"),
    (lambda a: a.remove("zoe", who="op"), "no user 'zoe'"),
]


def test_mistakes_are_told_and_change_nothing(accounts: Accounts) -> None:
    accounts.add("ana", who="op")
    before = accounts.users()
    for call, said in MISTAKES:
        with pytest.raises(UserError, match=said):
            call(accounts)
    assert accounts.users() == before
