from minserve.worker.oom import LOOK_S, OutOfMemory
from tests.fakes import FakeClock


class Kernel:
    def __init__(self, count: int | None = 5) -> None:
        self.count = count
        self.clock = FakeClock()
        self.watch = OutOfMemory(self.clock, lambda: self.count)


def test_a_risen_count_is_seen_at_once_and_for_a_while() -> None:
    kernel = Kernel()
    assert not kernel.watch.lately()
    kernel.clock.advance(100 * LOOK_S)
    kernel.count = 6
    assert kernel.watch.lately()
    kernel.clock.advance(LOOK_S)
    assert kernel.watch.lately(), "its process may take seconds to end"
    kernel.clock.advance(LOOK_S)
    assert not kernel.watch.lately(), "an old kill explains no new one"


def test_where_the_kernel_does_not_count_nothing_is_claimed() -> None:
    kernel = Kernel(None)
    kernel.clock.advance(100)
    assert not kernel.watch.lately()


def test_once_closed_it_looks_no_more() -> None:
    kernel = Kernel()
    kernel.watch.close()
    kernel.count = 6
    kernel.clock.advance(10 * LOOK_S)
    assert kernel.watch.lately(), "compared with what it was when it was closed"
