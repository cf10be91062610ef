import pytest

from minserve.dispatch.rate import WINDOW_S, Rate
from tests.fakes import FakeClock


@pytest.mark.parametrize("seconds", [0.5, 3.0, 100.0])
def test_a_steady_rate_is_seen_from_the_beginning(seconds: float) -> None:
    clock = FakeClock()
    rate = Rate(clock)
    for _ in range(int(seconds * 20)):
        clock.advance(0.05)
        rate.count()
    assert rate.per_second() == pytest.approx(20, rel=0.05)


def test_a_rate_fades_when_nothing_comes() -> None:
    clock = FakeClock()
    rate = Rate(clock)
    assert rate.per_second() == 0
    for _ in range(1000):
        clock.advance(0.1)
        rate.count()
    clock.advance(WINDOW_S)
    assert rate.per_second() == pytest.approx(10 / 2.718, rel=0.05)
    clock.advance(100 * WINDOW_S)
    assert rate.per_second() < 1e-6
