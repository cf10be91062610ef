"""How many places a worker has."""

import pytest

from minserve.worker.places import FORGET, MOST, SLOW_S, WAY_S, Places
from tests.fakes import FakeClock


def places(fixed: int | None = None) -> tuple[Places, FakeClock]:
    clock = FakeClock()
    return Places(clock, fixed), clock


def count(these: Places, *, full: bool = True) -> int:
    return next(number for number in range(MOST + 2) if not these.allow(number, full=full))


@pytest.mark.parametrize("fixed", [1, 2, 40])
@pytest.mark.parametrize("full", [True, False])
def test_a_fixed_number_is_kept_whatever_the_batches_are_like(fixed: int, full: bool) -> None:
    these, clock = places(fixed)
    for seconds in (1e-6, 100.0, None):
        these.finished(seconds)
        clock.advance(60.0)
        assert these.allow(fixed - 1, full=full)
        assert not these.allow(fixed, full=full)


def test_a_number_that_the_ranks_tell_is_kept_from_then_on() -> None:
    these, clock = places()
    these.fix(3)
    these.finished(60.0)
    clock.advance(60.0)
    assert count(these) == count(these, full=False) == 3


def test_until_a_batch_has_been_answered_there_is_one() -> None:
    these, _ = places()
    these.began()
    assert count(these) == 1
    these.finished(None)
    assert count(these) == 1


@pytest.mark.parametrize(
    ("seconds", "most"),
    [(0.0, MOST), (1e-6, MOST), (WAY_S / 4, 5), (WAY_S, 2), (0.002, 2), (SLOW_S * 0.99, 2), (SLOW_S, 1), (60.0, 1)],
)
def test_the_shorter_the_batches_the_more_of_them_fill_the_way(seconds: float, most: int) -> None:
    these, _ = places()
    these.finished(seconds)
    assert count(these) == most


def test_a_batch_that_is_not_full_goes_ahead_of_no_other() -> None:
    these, _ = places()
    these.finished(0.0)
    assert count(these, full=False) == 1


def test_a_long_batch_counts_at_once_and_is_forgotten_slowly() -> None:
    these, _ = places()
    for _ in range(100):
        these.finished(1e-5)
    assert count(these) == MOST
    these.finished(2 * SLOW_S)
    assert count(these) == 1
    batches = 0
    while count(these) == 1:
        these.finished(1e-5)
        batches += 1
    assert 5 < batches < 1 / FORGET


def test_nothing_more_goes_behind_a_batch_that_takes_long() -> None:
    these, clock = places()
    these.finished(1e-5)
    clock.advance(60.0)
    these.began()
    clock.advance(SLOW_S / 2)
    assert these.allow(1, full=True)
    clock.advance(SLOW_S / 2)
    assert not these.allow(1, full=True)
    assert these.allow(0, full=True)
    these.finished(1e-5)  # the next one is the oldest now, and only begins
    assert these.allow(1, full=True)
