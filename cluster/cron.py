"""Cron expressions in a time zone: the moments at which a schedule is due, its *ticks*.

Owns what happens where a zone's clocks are changed. croniter reads the fields; the calendar is
walked here, day by day in local time, so that a search over years stays cheap and every rule below
is this file's own:

- A local time that does not exist (clocks were put forward over it) is due at the first moment
  after the gap; several of one gap are one tick.
- A local time that comes twice (clocks were put back) is due once, when it comes first.
- What repeats within the day keeps its pace instead: an expression of every hour takes no notice of
  hours that do not exist, and it, like one of every minute or every n minutes, is due both times in
  an hour that comes twice.
- Where neither day field is `*`, a day that fits one of them fits.

A tick is a moment in whole seconds since 1970, so it has no zone, and never comes twice.
"""

import calendar
import itertools
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cached_property
from zoneinfo import ZoneInfo, available_timezones

from croniter import CroniterError, croniter

from cluster.errors import ScheduleError
from configs.errors import did_you_mean

_ONE_DAY = timedelta(days=1)
_MINUTE_S = 60
_HORIZON_DAYS = 366 * 9
"""29 February comes within eight years, the turn of a century included; all else sooner."""

_DAYS_KEPT = 16

_FIELDS = ("minute", "hour", "day of month", "month", "day of week")
_FORM = "five fields are allowed: minute, hour, day of month, month, day of week"
_SHORT = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_PART = re.compile(r"(\*|\w+(-(?P<last>\w+))?)(/\d+)?")
_NAME = re.compile(r"jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|sun|mon|tue|wed|thu|fri|sat")


@dataclass(frozen=True)
class Cron:
    """A cron expression, read in a time zone. Immutable; equal where text and zone are.

    Make it by `Cron.parse`.
    """

    expression: str
    timezone: str
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int] | None
    months: frozenset[int]
    weekdays: frozenset[int] | None

    @classmethod
    def parse(cls, expression: str, timezone: str = "UTC") -> "Cron":
        """Read an expression of five fields, or one of `@hourly`, `@daily` and the like.

        Fields hold numbers, names of months and days of the week, `*`, lists, ranges and steps:
        what cron and Kubernetes understand alike.

        Raises:
            ScheduleError: It cannot be read, or would never be due; or the zone is unknown.
        """
        zone_of(timezone)
        fields = _fields_of(expression)
        try:
            expanded, _ = croniter.expand(" ".join(fields))
        except (CroniterError, ValueError) as error:
            raise ScheduleError(
                f"received the cron expression {expression!r}, which cannot be read ({error}); "
                f"{_FORM}, such as '30 2 * * *'. Correct it."
            ) from None
        sets = [
            None if "*" in values else frozenset(int(value) for value in values)
            for values in expanded
        ]
        minutes, hours, days, months, weekdays = sets
        if weekdays is not None:  # cron counts from Sunday
            weekdays = frozenset((day - 1) % 7 for day in weekdays)
        cron = cls(
            expression,
            timezone,
            tuple(sorted(minutes if minutes is not None else range(60))),
            tuple(sorted(hours if hours is not None else range(24))),
            days,
            months if months is not None else frozenset(range(1, 13)),
            weekdays,
        )
        cron._check_that_it_fires()
        return cron

    def ticks(self, after: float) -> Iterator[int]:
        """All ticks later than a moment, in order, without end."""
        day = self._day_of(after) - _ONE_DAY
        waiting: list[int] = []
        while True:
            found = self._ticks_of(day)
            waiting = sorted({*waiting, *found}) if waiting else found
            day += _ONE_DAY
            # Clocks put back over midnight: a day's first minutes may come before the last of the
            # day before.
            ripe = bisect_right(waiting, self._moment(day, 0) - 1)
            yield from waiting[bisect_right(waiting, after, 0, ripe) : ripe]
            waiting = waiting[ripe:]

    def next(self, after: float) -> int:
        """The first tick later than a moment."""
        return next(self.ticks(after))

    def newest(self, until: float) -> int | None:
        """The last tick that is not later than a moment; None where years before it have none."""
        day = self._day_of(until) + _ONE_DAY
        found: int | None = None
        for _ in range(_HORIZON_DAYS):
            ticks = self._ticks_of(day)
            earlier = bisect_right(ticks, until)
            if found is not None:  # the day before may end later than this one began
                return max([found, *ticks[:earlier][-1:]])
            found = ticks[earlier - 1] if earlier else None
            day -= _ONE_DAY
        return found

    def count(self, after: float, until: float) -> int:
        """How many ticks are later than one moment and not later than another."""
        if until <= after:
            return 0
        first, last = self._day_of(after) + _ONE_DAY, self._day_of(until) - _ONE_DAY
        if last - first < 3 * _ONE_DAY:
            return self._count_each(after, until)
        # Midnights where no clock is changed nearby part the days from each other.
        while not (self._is_plain(first - _ONE_DAY) and self._is_plain(first)):
            first += _ONE_DAY
        while not (self._is_plain(last) and self._is_plain(last + _ONE_DAY)):
            last -= _ONE_DAY
        if last <= first:
            return self._count_each(after, until)
        begin, end = self._moment(first, 0) - 1, self._moment(last, 0) - 1
        days = (first + timedelta(days=number) for number in range((last - first).days))
        whole = sum(self._count_of(day) for day in days)
        return self._count_each(after, begin) + whole + self._count_each(end, until)

    @property
    def keeps_pace(self) -> bool:
        """Whether it is due both times in an hour that comes twice."""
        minute = _fields_of(self.expression)[0]
        return self._is_hourly or minute.startswith("*")

    @property
    def _is_hourly(self) -> bool:
        return len(self.hours) == 24

    @cached_property
    def _zone(self) -> ZoneInfo:
        return zone_of(self.timezone)

    @cached_property
    def _offsets_s(self) -> list[int]:
        """Seconds since midnight at which a day that fits is due."""
        return [hour * 3600 + minute * 60 for hour in self.hours for minute in self.minutes]

    @cached_property
    def _found(self) -> dict[date, list[int]]:
        """Ticks of the days that were asked for last."""
        return {}

    def _check_that_it_fires(self) -> None:
        longest = max(calendar.monthrange(2000, month)[1] for month in self.months)  # a leap year
        if self.weekdays is None and self.days is not None and min(self.days) > longest:
            raise ScheduleError(
                f"the cron expression {self.expression!r} would never be due: no month of it has a "
                f"day {min(self.days)}. Correct day of month, or month."
            )

    def _fits(self, day: date) -> bool:
        if day.month not in self.months:
            return False
        if self.days is None:
            return self.weekdays is None or day.weekday() in self.weekdays
        if self.weekdays is None:
            return day.day in self.days
        return day.day in self.days or day.weekday() in self.weekdays

    def _count_of(self, day: date) -> int:
        if not self._fits(day):
            return 0
        return len(self._offsets_s) if self._is_plain(day) else len(self._ticks_of(day))

    def _count_each(self, after: float, until: float) -> int:
        found = 0
        for tick in self.ticks(after):
            if tick > until:
                break
            found += 1
        return found

    def _ticks_of(self, day: date) -> list[int]:
        """The ticks of the local times of one day, in order."""
        if not self._fits(day):
            return []
        if day not in self._found:
            if len(self._found) == _DAYS_KEPT:
                self._found.clear()
            self._found[day] = self._find_ticks_of(day)
        return self._found[day]

    def _find_ticks_of(self, day: date) -> list[int]:
        if self._is_plain(day):
            midnight = self._moment(day, 0)
            return [midnight + offset_s for offset_s in self._offsets_s]
        moments = (self._moments(day, offset_s) for offset_s in self._offsets_s)
        return sorted(set(itertools.chain.from_iterable(moments)))

    def _is_plain(self, day: date) -> bool:
        """Whether no clock is changed on a day."""
        first = datetime.combine(day, time(), self._zone)
        last = datetime.combine(day, time(23, 59, 59), self._zone).replace(fold=1)
        return first.utcoffset() == last.utcoffset()

    def _moments(self, day: date, offset_s: int) -> list[int]:
        """When a local time is due: once as a rule, both times, or never (see the head)."""
        early, late = self._moment(day, offset_s, 0), self._moment(day, offset_s, 1)
        if early == late:
            return [early]
        if early < late:
            return [early, late] if self.keeps_pace else [early]
        # It does not exist: read by the clock after the change it lies before it, and vice versa.
        return [] if self._is_hourly else [self._change_between(late, early)]

    def _moment(self, day: date, offset_s: int, fold: int = 0) -> int:
        local = datetime.combine(day, time(), self._zone) + timedelta(seconds=offset_s)
        return int(local.replace(fold=fold).timestamp())

    def _day_of(self, moment: float) -> date:
        return datetime.fromtimestamp(moment, self._zone).date()

    def _change_between(self, before: int, after: int) -> int:
        """The first second with the clock of `after`."""
        changed = self._offset_at(after)
        while after - before > 1:
            middle = (before + after) // 2
            if self._offset_at(middle) == changed:
                after = middle
            else:
                before = middle
        return after

    def _offset_at(self, moment: int) -> timedelta | None:
        return datetime.fromtimestamp(moment, UTC).astimezone(self._zone).utcoffset()


def zone_of(name: str) -> ZoneInfo:
    """A time zone by its IANA name.

    Raises:
        ScheduleError: There is none of this name.
    """
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError):
        guess = did_you_mean(name, available_timezones())
        raise ScheduleError(
            f"received the time zone {name!r}; IANA names such as UTC or Europe/Zurich are "
            f"allowed.{guess} Correct schedule.timezone."
        ) from None


def _fields_of(expression: str) -> list[str]:
    """The five fields, checked as far as croniter would take more, or take it for something else.

    Raises:
        ScheduleError: There are not five, or one is not written as cron writes it.
    """
    text = expression.strip().lower()
    if "tz=" in text:
        raise ScheduleError(
            f"received {expression!r}; {_FORM}. Name the zone in schedule.timezone instead."
        )
    if text.startswith("@"):
        if text not in _SHORT:
            raise ScheduleError(
                f"received {expression!r}; {', '.join(_SHORT)} and {_FORM}."
                f"{did_you_mean(text, _SHORT)}"
            )
        text = _SHORT[text]
    fields = text.split()
    if len(fields) != len(_FIELDS):
        surplus = " Cron knows neither seconds nor years." if len(fields) > len(_FIELDS) else ""
        raise ScheduleError(
            f"received {len(fields)} fields in {expression!r}; {_FORM}, such as '30 2 * * *'."
            f"{surplus} Correct schedule.cron."
        )
    for name, field in zip(_FIELDS, fields, strict=True):
        for part in field.split(","):
            _check_part(expression, name, part)
    return fields


def _check_part(expression: str, name: str, part: str) -> None:
    found = _PART.fullmatch(part)
    words = re.findall(r"[a-z]+", part)
    if found is None or not all(_NAME.fullmatch(word) for word in words):
        raise ScheduleError(
            f"received {part!r} as {name} in {expression!r}; numbers, names such as mon or jan, "
            "'*', ranges (1-5), steps (*/15) and lists of these are allowed. Correct it."
        )
    last = found["last"]
    if last is not None and part.startswith(f"{last}-"):  # croniter takes 5-5 for all values
        raise ScheduleError(
            f"received the range {part!r} as {name} in {expression!r}; its ends are to differ. "
            f"Write {last}."
        )
