"""When a batch that is not full waits, and what that does to latencies and throughput."""

import asyncio
import random
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from minserve.dispatch.dispatcher import Dispatcher
from minserve.dispatch.patience import PATIENT, Patience
from minserve.dispatch.request import Request
from minserve.wire.messages import Answer, RequestMeta
from tests.fakes import FakeTimeLoop

WINDOW = 0.05
BATCH_S, BATCH_SIZE = 0.005, 8


def patience(gap: float, arrivals: int = 10) -> Patience:
    """One that has seen arrivals so far apart; the last was at 100 s."""
    this = Patience(WINDOW, adaptive=True)
    for number in range(arrivals):
        this.arrived(100.0 - (arrivals - 1 - number) * gap)
    return this


@pytest.mark.parametrize(
    ("gap", "waiting", "until"),
    [
        (0.001, 1, 100.0 + PATIENT * 0.001),
        (0.001, 3, 100.0 + PATIENT * 0.001),
        (0.001, 4, 0.0),  # 5 gaps are a batch
        (0.0026, 1, 0.0),
        (0.04, 1, 0.0),
        (10.0, 1, 0.0),  # further apart than they may wait
    ],
)
def test_requests_wait_while_that_costs_them_less_than_it_saves_the_next(
    gap: float, waiting: int, until: float
) -> None:
    found = patience(gap).until(waiting, 99.99, BATCH_S, last_place=True)
    assert found == pytest.approx(until)


def test_nobody_waits_longer_than_the_window() -> None:
    assert patience(0.02).until(1, 99.96, 1.0, last_place=True) == pytest.approx(99.96 + WINDOW)


def test_nobody_waits_where_nothing_is_known_or_another_place_is_free() -> None:
    assert patience(0.001, arrivals=1).until(1, 100.0, BATCH_S, last_place=True) == 0.0
    assert patience(0.001).until(1, 100.0, None, last_place=True) == 0.0
    assert patience(0.001).until(1, 100.0, BATCH_S, last_place=False) == 0.0


def test_after_a_pause_the_gap_is_learnt_anew() -> None:
    this = patience(0.001)
    this.arrived(160.0)
    assert this.until(1, 160.0, BATCH_S, last_place=True) == 0.0
    this.arrived(160.001)
    assert this.until(1, 160.0, BATCH_S, last_place=True) > 160.001


def test_a_window_is_always_waited_for() -> None:
    this = Patience(WINDOW, adaptive=False)
    assert this.until(1, 100.0, None, last_place=False) == 100.0 + WINDOW


# ── in use: a worker whose batches take 5 ms however full they are ──


@dataclass
class SimulatedLane:
    loop: asyncio.AbstractEventLoop
    free: Callable[[], None]
    under_way: int = 0
    batch_seconds: float | None = None
    sizes: list[int] = field(default_factory=list)

    def has_place(self, *, full: bool, ahead: int = 0) -> bool:
        return self.under_way + ahead < 1

    def send(self, requests: list[Request]) -> None:
        self.under_way = 1
        self.sizes.append(len(requests))
        self.loop.call_later(BATCH_S, self._finish, requests)

    def _finish(self, requests: list[Request]) -> None:
        self.under_way, self.batch_seconds = 0, BATCH_S
        for request in requests:
            request.answer(Answer(0, 0), b"")
        self.free()


@dataclass
class Seen:
    latencies: list[float]
    seconds: float

    def quantile(self, number: int) -> float:
        return statistics.quantiles(self.latencies, n=100)[number - 1]


Ask = Callable[[], Awaitable[None]]


async def open_loop(ask: Ask, rate: float) -> None:
    """Poisson arrivals."""
    chance = random.Random(7)
    async with asyncio.TaskGroup() as group:
        for _ in range(600):
            group.create_task(ask())  # type: ignore[arg-type]
            await asyncio.sleep(chance.expovariate(rate))


async def closed_loop(ask: Ask, clients: int) -> None:
    """Each client thinks for a moment and asks again."""

    async def client(number: int) -> None:
        chance = random.Random(number)
        for _ in range(100):
            await ask()
            await asyncio.sleep(chance.uniform(0.0, 0.001))

    await asyncio.gather(*map(client, range(clients)))


def simulate(load: Callable[[Ask, float], Awaitable[None]], amount: float, *, adaptive: bool) -> Seen:
    async def run() -> Seen:
        loop = asyncio.get_running_loop()
        dispatcher = Dispatcher(loop, "m", BATCH_SIZE, WINDOW, 10_000, adaptive=adaptive)
        dispatcher.attach(SimulatedLane(loop, dispatcher.wake))
        latencies = []

        async def ask() -> None:
            began = loop.time()
            await dispatcher.submit(Request(RequestMeta("", (), ()), [], began + 60.0, loop.create_future()))
            latencies.append(loop.time() - began)

        began = loop.time()
        await load(ask, amount)
        return Seen(latencies, loop.time() - began)

    with asyncio.Runner(loop_factory=FakeTimeLoop) as runner:
        return runner.run(run())


@pytest.mark.parametrize(
    ("load", "amount"),
    [
        *((open_loop, rate) for rate in (5, 50, 200, 400, 800, 1200)),  # at 1600 a second every batch is full
        *((closed_loop, clients) for clients in (1, 2, 4, 7, 8, 16, 64)),
    ],
)
def test_no_load_is_answered_later_or_more_slowly_than_with_the_window(
    load: Callable[[Ask, float], Awaitable[None]], amount: float
) -> None:
    adaptive, window = (simulate(load, amount, adaptive=adaptive) for adaptive in (True, False))
    assert adaptive.quantile(50) <= 1.02 * window.quantile(50)
    assert adaptive.quantile(99) <= 1.05 * window.quantile(99)
    assert adaptive.seconds <= 1.02 * window.seconds


@pytest.mark.parametrize(("load", "amount"), [(open_loop, 5), (closed_loop, 1)])
def test_a_request_that_is_alone_is_answered_in_the_time_of_a_batch(
    load: Callable[[Ask, float], Awaitable[None]], amount: float
) -> None:
    assert simulate(load, amount, adaptive=True).quantile(50) == pytest.approx(BATCH_S)
    assert simulate(load, amount, adaptive=False).quantile(50) == pytest.approx(BATCH_S + WINDOW)
