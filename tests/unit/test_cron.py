"""Cron in time zones, against a brute force that walks every minute and knows no calendar."""

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from croniter import croniter
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cron import Cron
from cluster.errors import ScheduleError

ZONES = ("Europe/Zurich", "America/New_York", "Australia/Lord_Howe", "UTC")
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
END = datetime(2028, 1, 1, tzinfo=UTC)


def moment(zone: str, *local: int, fold: int = 0) -> int:
    return int(datetime(*local, tzinfo=ZoneInfo(zone), fold=fold).timestamp())


def shown(zone: str, ticks: list[int]) -> list[str]:
    local = [datetime.fromtimestamp(tick, ZoneInfo(zone)) for tick in ticks]
    return [f"{each:%m-%d %H:%M}" for each in local]


def ticks_between(cron: Cron, after: float, until: float) -> list[int]:
    return list(itertools.takewhile(lambda tick: tick <= until, cron.ticks(after)))


def walls(zone: str, begin: datetime, end: datetime) -> Iterator[tuple[int, datetime]]:
    """Every minute, with what a clock on the wall shows."""
    at = begin
    while at < end:
        yield int(at.timestamp()), at.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
        at += timedelta(minutes=1)


@pytest.fixture(scope="module")
def clocks() -> dict[str, list[tuple[int, datetime]]]:
    """The minutes around all changes of clocks in two years, and a stretch without any."""
    found = {}
    for zone in ZONES:
        days = [BEGIN + timedelta(days=n) for n in range(2 * 365)]
        offsets = [day.astimezone(ZoneInfo(zone)).utcoffset() for day in days]
        changes = [days[n] for n in range(1, len(days)) if offsets[n] != offsets[n - 1]]
        found[zone] = [
            list(walls(zone, at - timedelta(days=2), at + timedelta(days=1)))
            for at in (changes or [datetime(2027, 2, 27, tzinfo=UTC)])
        ]
    return found


def expected(minutes, matches, is_hourly, keeps_pace):
    """The rules as the documentation puts them, minute by minute."""
    ticks, seen, before = [], set(), minutes[0][1] - timedelta(minutes=1)
    for at, wall in minutes:
        left_out = []
        step = before + timedelta(minutes=1)
        while step < wall:
            left_out.append(step)
            step += timedelta(minutes=1)
        is_due = matches(wall) and (keeps_pace or wall not in seen)
        if not is_hourly and any(map(matches, left_out)):
            is_due = True
        if is_due:
            ticks.append(at)
        seen.add(wall)
        before = wall
    return ticks


EXPRESSIONS = [
    # text, matches, is_hourly, keeps_pace
    ("* * * * *", lambda t: True, True, True),
    ("*/15 * * * *", lambda t: t.minute % 15 == 0, True, True),
    ("0 * * * *", lambda t: t.minute == 0, True, True),
    ("45 0-23 * * *", lambda t: t.minute == 45, True, True),
    ("30 2 * * *", lambda t: (t.hour, t.minute) == (2, 30), False, False),
    ("0 2 * * *", lambda t: (t.hour, t.minute) == (2, 0), False, False),
    ("15,45 1,2 * * *", lambda t: t.hour in (1, 2) and t.minute in (15, 45), False, False),
    ("*/20 1-3 * * *", lambda t: t.hour in (1, 2, 3) and t.minute % 20 == 0, False, True),
    ("0 */2 * * *", lambda t: t.hour % 2 == 0 and t.minute == 0, False, False),
    ("30 1 * * sun", lambda t: t.weekday() == 6 and (t.hour, t.minute) == (1, 30), False, False),
]


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda each: each[0])
def test_around_every_change_of_clocks_ticks_are_those_of_brute_force(expression, zone, clocks):
    text, *rule = expression
    cron = Cron.parse(text, zone)
    assert len(clocks[zone]) == (1 if zone == "UTC" else 4)
    for minutes in clocks[zone]:
        found = ticks_between(cron, minutes[0][0] - 1, minutes[-1][0])
        assert found == expected(minutes, *rule)


@pytest.mark.parametrize("zone", ZONES)
def test_two_years_of_nights_are_due_once_each_local_day(zone):
    cron = Cron.parse("30 2 * * *", zone)
    ticks = ticks_between(cron, BEGIN.timestamp(), END.timestamp() - 1)
    days = [datetime.fromtimestamp(tick, ZoneInfo(zone)).date() for tick in ticks]
    assert len(days) == len(set(days))
    assert (days[-1] - days[0]).days == len(days) - 1 >= 728
    assert cron.count(BEGIN.timestamp(), END.timestamp()) == len(ticks)


def test_a_time_that_does_not_exist_is_due_at_the_first_moment_after_the_gap():
    zone = "Europe/Zurich"
    cron = Cron.parse("15,30,45 2 * * *", zone)
    ticks = list(itertools.islice(cron.ticks(moment(zone, 2026, 3, 28, 12)), 4))
    assert shown(zone, ticks) == ["03-29 03:00", "03-30 02:15", "03-30 02:30", "03-30 02:45"]


def test_half_an_hour_of_lord_howe():
    zone = "Australia/Lord_Howe"
    ticks = list(
        itertools.islice(Cron.parse("0 2 * * *", zone).ticks(moment(zone, 2026, 10, 3, 3)), 2)
    )
    assert shown(zone, ticks) == ["10-04 02:30", "10-05 02:00"]


def test_a_day_that_a_zone_left_out_is_made_good_at_once():
    zone = "Pacific/Apia"  # went over the date line: no 30 December 2011
    cron = Cron.parse("0 12 * * *", zone)
    ticks = list(itertools.islice(cron.ticks(moment(zone, 2011, 12, 29, 13)), 2))
    assert shown(zone, ticks) == ["12-31 00:00", "12-31 12:00"]


def test_clocks_put_back_over_midnight_keep_the_order():
    zone = "America/St_Johns"  # 00:01 became 23:01 of the day before
    cron = Cron.parse("*/30 * * * *", zone)
    ticks = list(itertools.islice(cron.ticks(moment(zone, 2010, 11, 6, 23)), 5))
    assert shown(zone, ticks) == [
        "11-06 23:30",
        *("11-07 00:00", "11-06 23:30", "11-07 00:00", "11-07 00:30"),
    ]
    assert ticks == sorted(ticks)
    assert [cron.newest(tick) for tick in ticks] == ticks


@settings(deadline=None, max_examples=60)
@given(
    minute=st.sampled_from(["*", "0", "*/7", "5,35", "10-20/5", "59"]),
    hour=st.sampled_from(["*", "3", "*/6", "22-2", "0,12"]),
    day=st.sampled_from(["*", "1", "31", "*/10", "10-15"]),
    month=st.sampled_from(["*", "2", "jan-mar", "*/5", "12"]),
    weekday=st.sampled_from(["*", "0", "7", "mon-fri", "sat,sun", "*/2", "5-1"]),
    start=st.datetimes(datetime(2024, 1, 1), datetime(2030, 1, 1)),
)
def test_without_changes_of_clocks_croniter_agrees(minute, hour, day, month, weekday, start):
    text = f"{minute} {hour} {day} {month} {weekday}"
    if day == "31" and month == "2" and weekday == "*":
        return
    begin = start.replace(tzinfo=UTC).timestamp()
    theirs = croniter(text, begin, max_years_between_matches=10)
    wanted = [int(theirs.get_next(float)) for _ in range(5)]
    assert list(itertools.islice(Cron.parse(text).ticks(begin), 5)) == wanted


@settings(deadline=None, max_examples=60)
@given(
    text=st.sampled_from([each[0] for each in EXPRESSIONS]),
    zone=st.sampled_from(ZONES),
    begin=st.integers(int(BEGIN.timestamp()), int(END.timestamp())),
    length=st.integers(0, 20 * 86400),
)
def test_counting_and_looking_back_agree_with_going_forward(text, zone, begin, length):
    cron = Cron.parse(text, zone)
    until = begin + length
    ticks = ticks_between(cron, begin, until)
    assert cron.count(begin, until) == len(ticks)
    if ticks:
        assert cron.newest(until) == ticks[-1]
        assert cron.next(begin) == ticks[0]
    assert ticks == sorted(set(ticks))


def test_years_of_minutes_are_counted_without_walking_them():
    cron = Cron.parse("* * * * *", "Europe/Zurich")
    assert cron.count(BEGIN.timestamp(), END.timestamp()) == 730 * 24 * 60


def test_a_leap_day_is_found_over_the_turn_of_a_century():
    cron = Cron.parse("0 0 29 2 *")
    after = moment("UTC", 2096, 3, 1)
    assert cron.next(after) == moment("UTC", 2104, 2, 29)
    assert cron.newest(moment("UTC", 2104, 1, 1)) == moment("UTC", 2096, 2, 29)


def test_either_day_field_is_enough_where_both_are_given():
    cron = Cron.parse("0 0 13 * fri")
    ticks = list(itertools.islice(cron.ticks(moment("UTC", 2026, 2, 1)), 4))
    assert shown("UTC", ticks) == ["02-06 00:00", "02-13 00:00", "02-20 00:00", "02-27 00:00"]


@pytest.mark.parametrize(
    ("expression", "timezone", "words"),
    [
        ("0 0 30 2 *", "UTC", "would never be due: no month of it has a day 30"),
        ("0 0 31 4,6,9,11 *", "UTC", "would never be due"),
        ("0 2 * * *", "Europe/Zuerich", "Did you mean 'Europe/Zurich'"),
        ("0 2 * * *", "europe/zurich", "'Europe/Zurich'"),
        ("0 2 * * *", "", "received the time zone ''"),
        ("0 2 * * *", "../etc/passwd", "IANA names such as"),
        ("0 0 2 * * *", "UTC", "received 6 fields .* neither seconds nor years"),
        ("0 2 * *", "UTC", "received 4 fields"),
        ("", "UTC", "received 0 fields"),
        ("CRON_TZ=Europe/Zurich 0 2 * * *", "UTC", "Name the zone in schedule.timezone"),
        ("TZ=UTC 0 2 * * *", "UTC", "Name the zone in schedule.timezone"),
        ("@dayly", "UTC", "Did you mean '@daily'"),
        ("@reboot", "UTC", "@hourly"),
        ("61 2 * * *", "UTC", "cannot be read"),
        ("mon 2 * * *", "UTC", "cannot be read"),
        ("*/0 2 * * *", "UTC", "cannot be read"),
        ("0 5-5 * * *", "UTC", "its ends are to differ. Write 5"),
        ("0 0 L * *", "UTC", "received 'l' as day of month"),
        ("0 0 * * mon#2", "UTC", "received 'mon#2' as day of week"),
        ("H 2 * * *", "UTC", "received 'h' as minute"),
        ("0 2 * * montag", "UTC", "received 'montag' as day of week"),
        ("0;2 * * * *", "UTC", "received '0;2' as minute"),
    ],
)
def test_what_cannot_be_read_is_said(expression, timezone, words):
    with pytest.raises(ScheduleError, match=words):
        Cron.parse(expression, timezone)


def test_months_may_be_short_where_a_weekday_fits_too():
    cron = Cron.parse("0 0 30 2 mon")
    assert shown("UTC", [cron.next(moment("UTC", 2026, 2, 1))]) == ["02-02 00:00"]


def test_short_names_are_expressions():
    assert Cron.parse("@daily").next(0) == 86400
    assert Cron.parse("@hourly").keeps_pace
