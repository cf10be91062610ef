import pytest

from minserve.worker.scaling import FIRST_PAUSE_S, LONGEST_PAUSE_S, Scale, Scaler
from tests.fakes import FakeClock


def scaler(clock: FakeClock | None = None, fewest: int = 1, most: int = 3) -> Scaler:
    return Scaler(clock or FakeClock(), fewest, most, up_wait=1.0, down_idle=60.0)


@pytest.mark.parametrize(
    ("workers", "settled", "wait", "decision"),
    [
        (1, True, 1.0, None),
        (1, True, 1.1, Scale.UP),
        (2, True, 9.0, Scale.UP),
        (3, True, 9.0, None),  # the most
        (1, False, 9.0, None),  # one is on its way
    ],
)
def test_a_worker_more_while_requests_wait(workers: int, settled: bool, wait: float, decision: Scale | None) -> None:
    assert scaler().look([0.0] * workers, settled=settled, oldest_wait=wait) is decision


@pytest.mark.parametrize(
    ("idle", "settled", "wait", "decision"),
    [
        ([0.0, 60.0], True, 0.0, Scale.DOWN),
        ([59.0, 59.9], True, 0.0, None),
        ([600.0], True, 0.0, None),  # the fewest
        ([0.0, 60.0], False, 0.0, None),  # another may be about to be lost
        ([0.0, 60.0], True, 1.1, Scale.UP),  # a lane without room is idle, and requests wait
    ],
)
def test_a_worker_less_while_one_idles(idle: list[float], settled: bool, wait: float, decision: Scale | None) -> None:
    assert scaler().look(idle, settled=settled, oldest_wait=wait) is decision


def test_nothing_is_done_where_every_worker_was_given_up() -> None:
    assert scaler().look([], settled=True, oldest_wait=0.0) is None


def test_a_worker_that_could_not_be_added_is_tried_again_ever_later() -> None:
    clock = FakeClock()
    decider = scaler(clock)
    pauses = []
    for _ in range(8):
        pause = decider.failed()
        pauses.append(pause)
        clock.advance(pause - 0.1)
        assert decider.look([0.0], settled=True, oldest_wait=9.0) is None
        clock.advance(0.1)
        assert decider.look([0.0], settled=True, oldest_wait=9.0) is Scale.UP
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S
    decider.succeeded()
    assert decider.failed() == FIRST_PAUSE_S
