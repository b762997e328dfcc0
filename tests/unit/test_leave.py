"""A node's farewell: how long it waits. That gangs hand over is shown by the replay."""

from cluster.leave import wait_until


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_it_waits_until_it_is_so():
    clock = Clock()
    assert wait_until(lambda: clock.now >= 3, 10.0, clock, clock.sleep)
    assert 3 <= clock.now < 4


def test_it_gives_up_at_its_time():
    clock = Clock()
    assert not wait_until(lambda: False, 10.0, clock, clock.sleep)
    assert 10 <= clock.now < 11


def test_what_is_so_already_is_not_waited_for():
    clock = Clock()
    assert wait_until(lambda: True, 0.0, clock, clock.sleep)
    assert clock.now == 0
