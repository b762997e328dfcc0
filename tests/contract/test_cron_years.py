"""Two whole years, minute by minute, in four zones: the slow proof of what unit tests sample."""

import itertools
from datetime import UTC, datetime

import pytest

from cluster.cron import Cron
from tests.unit.test_cron import EXPRESSIONS, ZONES, expected, walls


@pytest.mark.long
@pytest.mark.parametrize("zone", ZONES)
def test_two_years_of_ticks_are_those_of_brute_force(zone: str) -> None:
    begin, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2028, 1, 1, tzinfo=UTC)
    minutes = list(walls(zone, begin, end))
    for text, *rule in EXPRESSIONS:
        cron = Cron.parse(text, zone)
        ticks = cron.ticks(begin.timestamp() - 1)
        found = list(itertools.takewhile(lambda tick: tick < end.timestamp(), ticks))
        assert found == expected(minutes, *rule)
        assert cron.count(begin.timestamp() - 1, end.timestamp() - 1) == len(found)
