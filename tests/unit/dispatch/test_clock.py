from __future__ import annotations

import math

from minserve.dispatch.clock import Alarm
from tests.fakes import FakeClock


class Bell:
    """An alarm that remembers when it rang, in seconds since the start."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.start = self.clock.time()
        self.rang: list[float] = []
        self.alarm = Alarm(self.clock, lambda: self.rang.append(self.clock.time() - self.start))

    def at(self, seconds: float) -> None:
        self.alarm.at(self.start + seconds)


def test_rings_once_at_its_time() -> None:
    bell = Bell()
    bell.at(5)
    bell.clock.advance(4.9)
    assert bell.rang == []
    bell.clock.advance(10)
    assert bell.rang == [5]


def test_the_earliest_of_several_times_counts() -> None:
    bell = Bell()
    for seconds in (5, 7, 2, 3):
        bell.at(seconds)
    bell.clock.advance(10)
    assert bell.rang == [2]


def test_may_be_set_again_while_it_rings() -> None:
    clock = FakeClock()
    start = clock.time()
    rang: list[float] = []

    def ring() -> None:
        rang.append(clock.time() - start)
        if len(rang) < 3:
            alarm.at(clock.time() + 2)

    alarm = Alarm(clock, ring)
    alarm.at(start + 1)
    clock.advance(10)
    assert rang == [1, 3, 5]


def test_stopped_it_is_silent_until_set_again_also_to_a_later_time() -> None:
    bell = Bell()
    bell.at(1)
    bell.alarm.stop()
    bell.clock.advance(3)
    bell.at(4)
    bell.clock.advance(3)
    assert bell.rang == [4]


def test_a_time_gone_by_rings_at_once_and_never_does_not_ring() -> None:
    bell = Bell()
    bell.at(math.inf)
    bell.clock.advance(10**9)
    assert bell.rang == []
    bell.at(-1)
    bell.clock.advance(0)
    assert len(bell.rang) == 1
