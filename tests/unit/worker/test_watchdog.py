import pytest

from minserve.wire.board import Vitals
from minserve.worker.blame import Cause, What
from minserve.worker.outstanding import Limits
from minserve.worker.watchdog import LOOK_S, Watchdog
from tests.fakes import FakeClock, MemoryLink

RESPONSE, FIRST, STALL = 20.0, 60.0, 10.0


class Ranks:
    """Ranks whose signs of life the test sets, and the broadcast above them."""

    def __init__(self, count: int = 2, stall: float = STALL, probe_interval: float = 0.0) -> None:
        self.clock = FakeClock()
        self.vitals = [Vitals(heartbeat=1) for _ in range(count)]
        self.beating = set(range(count))
        self.busy = False
        self.batches_done = 1
        self.first_seq = 0
        self.states: dict[int, str] = {}
        self.replied = 0
        self.looks = 0
        self.probes: list[float] = []
        self.place = True
        self.suspects: list[tuple[Cause, int]] = []
        self.watchdog = Watchdog(
            *(self.clock, [MemoryLink(rank) for rank in range(count)], self),
            *(Limits(1, RESPONSE, FIRST, 2.0, stall_timeout=stall), self.read),
            *(lambda cause, seq: self.suspects.append((cause, seq)), probe_interval),
            lambda pid: self.states.get(pid, "S"),
        )

    def read(self, rank: int) -> Vitals:
        if rank in self.beating:
            self.vitals[rank] = self.vitals[rank]._replace(heartbeat=self.vitals[rank].heartbeat + 1)
        return self.vitals[rank]

    def finished(self, rank: int, seq: int) -> None:
        self.vitals[rank] = self.vitals[rank]._replace(received=seq, finished=seq)

    def look(self) -> None:
        self.looks += 1

    def has_place(self) -> bool:
        return self.place

    def probe(self) -> None:
        self.probes.append(self.clock.time())


def test_nothing_is_suspected_of_ranks_that_live_and_keep_up() -> None:
    ranks = Ranks()
    for seq in range(1, 400):
        ranks.replied = seq
        for rank in (0, 1):
            ranks.finished(rank, seq)
        ranks.clock.advance(LOOK_S)
    assert ranks.suspects == []
    assert ranks.looks == 399


@pytest.mark.parametrize(("busy", "seq"), [(False, 3), (True, 4)])
def test_a_rank_without_a_heartbeat_for_stall_timeout_is_suspected(busy: bool, seq: int) -> None:
    ranks = Ranks(3)
    ranks.busy, ranks.replied = busy, 3
    for rank in range(3):
        ranks.finished(rank, 3)
    ranks.clock.advance(30)
    ranks.beating.remove(2)
    ranks.clock.advance(STALL - LOOK_S)
    assert ranks.suspects == []
    ranks.clock.advance(2 * LOOK_S)
    ((cause, about),) = ranks.suspects
    assert (cause.what, cause.rank, cause.pid, about) == (What.STALL, 2, 4002, seq)
    assert cause.detail == "gave no sign of life for stallTimeout (10 s)"
    ranks.clock.advance(100)
    assert len(ranks.suspects) == 1, "the group is lost, there is nothing left to watch"


def test_a_heartbeat_that_comes_back_in_time_is_forgotten() -> None:
    ranks = Ranks()
    for _ in range(10):
        ranks.beating.clear()
        ranks.clock.advance(STALL - 1)
        ranks.beating = {0, 1}
        ranks.clock.advance(1)
    assert ranks.suspects == []


def test_stall_timeout_0_is_never() -> None:
    ranks = Ranks(stall=0.0)
    ranks.beating.clear()
    ranks.clock.advance(3600)
    assert ranks.suspects == []


def test_the_first_batch_may_hold_the_gil_for_longer() -> None:
    ranks = Ranks()
    ranks.first_seq, ranks.busy = 2, True  # the first one was a probe
    for rank in (0, 1):
        ranks.finished(rank, 1)
    ranks.beating.clear()
    ranks.clock.advance(5 * STALL)
    assert ranks.suspects == []


def test_each_rank_may_do_so_in_its_own_first_batch_and_begins_anew_behind_it() -> None:
    ranks = Ranks()
    ranks.first_seq, ranks.busy = 1, True
    ranks.beating.clear()
    ranks.clock.advance(2 * STALL)
    ranks.finished(0, 1)
    ranks.busy, ranks.replied = False, 1  # rank 0 has answered; rank 1 still compiles
    ranks.beating = {0}
    ranks.clock.advance(2 * STALL)
    ranks.finished(1, 1)
    ranks.clock.advance(STALL)
    assert ranks.suspects == []
    ranks.clock.advance(2 * LOOK_S)
    assert [cause.rank for cause, _ in ranks.suspects] == [1]


def test_but_a_rank_that_is_stopped_does_not_compile() -> None:
    ranks = Ranks()
    ranks.first_seq, ranks.busy = 1, True
    ranks.beating.clear()
    ranks.states = {4001: "T"}
    ranks.clock.advance(STALL + 2 * LOOK_S)
    assert [(cause.what, cause.rank) for cause, _ in ranks.suspects] == [(What.STALL, 1)]


def test_a_server_that_was_stopped_itself_blames_no_rank() -> None:
    """When it wakes up its clock has jumped, and the ranks may have been stopped with it."""
    ranks = Ranks()
    ranks.beating.clear()
    ranks.clock.advance(LOOK_S)
    ranks.clock._now += 3600
    ranks.clock.advance(0)
    assert ranks.suspects == []
    assert ranks.watchdog.silent[0] <= 3 * LOOK_S


def test_a_rank_that_does_not_finish_a_batch_after_rank_0_is_suspected() -> None:
    ranks = Ranks(3)
    for rank in range(3):
        ranks.finished(rank, 4)
    ranks.replied = 4
    ranks.clock.advance(100)
    ranks.replied = 6
    ranks.finished(0, 6)
    ranks.finished(2, 5)
    ranks.clock.advance(RESPONSE)
    assert ranks.suspects == []
    ranks.clock.advance(2 * LOOK_S)
    ((cause, seq),) = ranks.suspects
    assert (cause.what, cause.rank, seq) == (What.SILENCE, 1, 5)
    assert cause.detail == "did not finish batch 5 within 20 s of rank 0's answer"


def test_a_rank_that_is_always_a_little_behind_is_left_alone() -> None:
    ranks = Ranks()
    for seq in range(1, 20):
        ranks.replied = seq
        ranks.finished(0, seq)
        ranks.clock.advance(RESPONSE - 2)
        ranks.finished(1, seq)
    assert ranks.suspects == []


def test_on_its_first_batch_a_rank_may_compile_for_longer() -> None:
    ranks = Ranks()
    ranks.replied = ranks.first_seq = 2
    ranks.finished(0, 2)
    ranks.finished(1, 1)  # a probe
    ranks.clock.advance(FIRST)
    assert ranks.suspects == []
    ranks.clock.advance(2 * LOOK_S)
    assert [cause.rank for cause, _ in ranks.suspects] == [1]


def test_an_idle_worker_is_probed_once_an_interval_and_never_beside_work() -> None:
    ranks = Ranks(probe_interval=5.0)
    began = ranks.clock.time()
    ranks.clock.advance(11)
    first, second = ranks.probes
    assert 5 <= first - began < 6
    assert 5 <= second - first < 6
    ranks.probes.clear()
    for _ in range(10):  # a batch now and then
        ranks.batches_done += 1
        ranks.clock.advance(4.5)
    ranks.busy = True
    ranks.clock.advance(30)
    ranks.busy, ranks.place = False, False
    ranks.clock.advance(30)
    assert ranks.probes == []


def test_without_an_interval_nobody_is_probed_and_a_stopped_watchdog_looks_no_more() -> None:
    ranks = Ranks()
    ranks.clock.advance(1000)
    assert ranks.probes == []
    looks = ranks.looks
    ranks.watchdog.stop()
    ranks.clock.advance(10)
    assert ranks.looks == looks
