"""A dispatcher with a fake clock and lanes that only remember what they were sent."""

from __future__ import annotations

import asyncio

from minserve.dispatch.dispatcher import Dispatcher
from minserve.dispatch.request import Reply, Request
from minserve.errors import MinServeError
from minserve.wire.messages import Answer, RequestMeta
from tests.fakes import FakeClock


class FakeLane:
    """A worker with some places. `free` answers its oldest batch: each request with its own id."""

    def __init__(self, rig: Rig, places: int = 1) -> None:
        self.rig = rig
        self.places = places
        self.batch_seconds: float | None = None
        self.only_full = False  # a batch that is not full goes ahead of no other
        self.batches: list[list[Request]] = []
        self.sent: list[list[str]] = []

    @property
    def under_way(self) -> int:
        return len(self.batches)

    def has_place(self, *, full: bool, ahead: int = 0) -> bool:
        return len(self.batches) + ahead < (1 if self.only_full and not full else self.places)

    def send(self, requests: list[Request]) -> None:
        assert self.has_place(full=len(requests) == self.rig.batch_size), "sent to a lane without a place"
        now = self.rig.clock.time()
        assert all(not request.reply.done() and request.deadline > now for request in requests), "sent for nobody"
        self.batches.append(requests)
        self.sent.append([request.meta.id for request in requests])
        self.rig.sent += self.sent[-1]

    def fail(self, error: MinServeError, begun: bool = True) -> None:
        """The worker dies with its oldest batch in flight."""
        self.rig.dispatcher.retry(self.batches.pop(0), error, begun)

    def free(self) -> None:
        for request in self.batches.pop(0):
            request.answer(Answer(0, 0), request.meta.id.encode())
        self.rig.dispatcher.wake()


class Rig:
    """Submits requests as tasks and lets time pass."""

    def __init__(
        self,
        batch_size: int = 1,
        max_delay: float = 0.0,
        queue_limit: int = 100,
        lanes: int = 1,
        retries: int = 0,
        adaptive: bool = False,
    ) -> None:
        self.clock = FakeClock()
        self.batch_size = batch_size
        self.dispatcher = Dispatcher(self.clock, "m", batch_size, max_delay, queue_limit, retries, adaptive=adaptive)
        self.sent: list[str] = []  # ids in the order in which they left the queue, over all lanes
        self.lanes = [FakeLane(self) for _ in range(lanes)]
        for lane in self.lanes:
            self.dispatcher.attach(lane)

    @property
    def lane(self) -> FakeLane:
        (lane,) = self.lanes
        return lane

    def request(self, name: str, timeout: float = 60.0) -> Request:
        """A request by a letter: x and y explain, D and E describe, the others predict."""
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        operation = "explain" if name in "xy" else "describe" if name in "DE" else ""
        return Request(RequestMeta(name, (), (), operation=operation), [], self.clock.time() + timeout, reply)

    async def submit(self, names: str, timeout: float = 60.0) -> list[asyncio.Task[Reply]]:
        """One request for each letter, all of them before the dispatcher gets to cut."""
        tasks = [asyncio.create_task(self.dispatcher.submit(self.request(name, timeout))) for name in names]
        await settle()
        return tasks

    async def advance(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        await settle()


async def settle() -> None:
    """Lets the tasks that can go on do so."""
    for _ in range(3):
        await asyncio.sleep(0)
