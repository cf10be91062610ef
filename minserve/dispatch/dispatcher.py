"""The queue of one model version, and when a batch is cut from it.

Batches are cut late. A request stays in the queue, where its deadline and its client's leaving can still take it out, until
a worker has a free place. Then a batch is cut at once if `batch_size` requests wait or the oldest has waited `max_delay`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from typing import TYPE_CHECKING, Protocol

from minserve.dispatch.clock import Alarm
from minserve.dispatch.rate import Rate
from minserve.errors import DeadlineExceeded, MinServeError, QueueFull, no_workers
from minserve.telemetry.meters import unwatched

if TYPE_CHECKING:
    from minserve.dispatch.clock import Clock
    from minserve.dispatch.request import Reply, Request
    from minserve.telemetry.meters import ModelMeters

logger = logging.getLogger(__name__)

DESCRIBE = "describe"  # the operation of a request that asks about the model, and is counted nowhere


class Lane(Protocol):
    """What a worker is to the dispatcher: somewhere a batch can go."""

    @property
    def under_way(self) -> int:
        """How many batches it works on, or has before it."""

    def has_place(self, *, full: bool) -> bool:
        """Whether a batch may be sent now: there is a place, and every rank's link has room.

        Args:
            full: it has as many requests as a batch may have. One that is not goes ahead of no other
                unless `inFlight` says so.
        """

    def send(self, requests: list[Request]) -> None:
        """Sends a batch to all ranks. From here on the lane answers these requests, whatever happens."""


class Dispatcher:
    """Bounded queue in front of the workers of one model version.

    Args:
        model: name for messages.
        batch_size: most requests in a batch.
        max_delay: seconds the oldest request may wait for company; 0 means none waits.
        queue_limit: most requests that wait; those being worked on do not count.
        retries: how often a request is sent again whose worker failed with it in flight.

    Attributes:
        meters: of the model version, for all who have a share in its requests.
    """

    def __init__(
        self,
        clock: Clock,
        model: str,
        batch_size: int,
        max_delay: float,
        queue_limit: int,
        retries: int = 0,
        meters: ModelMeters | None = None,
    ) -> None:
        self._clock = clock
        self.meters = unwatched() if meters is None else meters
        self._model = model
        self._batch_size = batch_size
        self._max_delay = max_delay
        self._queue_limit = queue_limit
        self._retries = retries
        self._rate = Rate(clock)
        self._queue: deque[Request] = deque()
        self._live: set[Request] = set()  # queued and in flight
        self._lanes: list[Lane] = []
        self._refusal: MinServeError | None = None
        self._idle: asyncio.Future[None] | None = None  # for those who wait until no request is left
        self._cut_alarm = Alarm(clock, self._cut)
        self._deadline_alarm = Alarm(clock, self._expire)
        self._wake_pending = False

    # ── for the frontend ──

    async def submit(self, request: Request) -> Reply:
        """Admits a request and waits for its answer. Cancelling the call takes it out of the queue.

        Raises:
            MinServeError: it was refused, expired, or failed with its worker.
        """
        self.begin(request)
        answered = False
        try:
            reply = await request.reply
            answered = True
            return reply
        except asyncio.CancelledError:  # perhaps with the answer already there, and nobody to take it
            self.withdraw(request)
            raise
        finally:
            self.finish(request, answered)

    # The same for whoever has no task that could wait. Each `begin` that did not raise needs its `finish`.

    def begin(self, request: Request) -> None:
        """Admits a request, whose `reply` then tells the answer.

        Raises:
            MinServeError: it is refused.
        """
        if request.meta.operation != DESCRIBE:
            self.meters.arrived(request.named)
        if self._refusal is not None:
            raise self._refusal.with_traceback(None)
        if len(self._queue) >= self._queue_limit:
            raise self._full()
        request.arrived = self._clock.time()
        request.entered = self.meters.now()
        self._queue.append(request)
        self._live.add(request)
        self._deadline_alarm.at(request.deadline)
        self.wake()

    def withdraw(self, request: Request) -> None:
        """The client has left. In flight the ranks finish all the same, and nobody takes the answer."""
        try:
            self._queue.remove(request)
        except ValueError:
            if request.stream is not None:
                request.stream.mute()

    def finish(self, request: Request, answered: bool) -> None:
        """Nobody waits for a request's answer any more.

        Args:
            answered: because it has come, and is no error.
        """
        if answered:
            self._rate.count()
        self._live.discard(request)
        if self._idle is not None and not self._live:
            self._idle.set_result(None)
            self._idle = None

    @property
    def queued(self) -> int:
        """How many requests wait."""
        return len(self._queue)

    @property
    def remaining(self) -> int:
        """How many more may wait."""
        return max(0, self._queue_limit - len(self._queue))

    @property
    def oldest_wait(self) -> float:
        """Seconds that the oldest request in the queue has waited, 0 when it is empty."""
        return self._clock.time() - self._queue[0].arrived if self._queue else 0.0

    async def answered(self) -> None:
        """Waits until no request is left: each has its answer, a stream its first chunk."""
        if self._live:
            if self._idle is None:
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)  # several may wait, and each may give up

    # ── for the supervisor and the workers ──

    def refuse(self, error: MinServeError) -> None:
        """From now on no request is admitted, and those that wait are answered: `error` says why."""
        self._refusal = error
        queue, self._queue = self._queue, deque()
        for request in queue:
            request.fail(error)

    def admit(self) -> None:
        """Requests are admitted again after `refuse`."""
        self._refusal = None

    def configure(self, batch_size: int, max_delay: float, queue_limit: int, retries: int) -> None:
        """Takes over changed options; what waits already stays."""
        self._batch_size, self._max_delay, self._queue_limit = batch_size, max_delay, queue_limit
        self._retries = retries
        self.wake()

    def retry(self, requests: list[Request], error: MinServeError, begun: bool) -> None:
        """A worker has failed with these in flight: those that may be tried again wait again, in front, the others fail.

        Args:
            begun: a rank had begun with them. If none had, they wait again as if they had never left the queue.
        """
        again = [request for request in requests if self._may_wait_again(request, begun)]
        for request in requests:
            if request not in again:
                request.fail(error)
        for request in reversed(again):
            request.attempts += begun
            request.worker = ""
            self._queue.appendleft(request)
        if again:
            self.wake()

    def attach(self, lane: Lane) -> None:
        """A worker is ready for batches."""
        self._lanes.append(lane)
        self.wake()

    def detach(self, lane: Lane) -> None:
        """A worker takes no more batches."""
        if lane in self._lanes:
            self._lanes.remove(lane)

    def wake(self) -> None:
        """Something has changed that may let a batch go: a request, a free place, room on a link.

        The cut happens once the loop has run what is ready, so that requests which arrived together travel together; those
        that travel alone go at once.
        """
        if self._batch_size == 1:
            self._cut()
        elif self._queue and not self._wake_pending:
            self._wake_pending = True
            self._clock.call_soon(self._woken)

    # ── inside ──

    def _woken(self) -> None:
        self._wake_pending = False
        self._cut()

    def _cut(self) -> None:
        while self._queue:
            if len(self._queue) < self._batch_size and self._max_delay and not self._queue[0].attempts:
                due = self._queue[0].arrived + self._max_delay
                if self._clock.time() < due:
                    self._cut_alarm.at(due)
                    return
            lane = self._next_lane(full=len(self._queue) >= self._batch_size)
            if lane is None:
                return
            batch = self._take()
            if batch:
                self._send(lane, batch)

    def _send(self, lane: Lane, batch: list[Request]) -> None:
        try:
            lane.send(batch)
        except MinServeError as error:
            for request in batch:
                request.fail(error)
        except Exception:  # nothing in a request may do this; if it does, its clients shall know
            logger.exception("%s: a batch could not be sent", self._model)
            for request in batch:
                request.fail(MinServeError(f'Model "{self._model}": the request could not be sent to the ranks'))

    def _next_lane(self, *, full: bool) -> Lane | None:
        """The one with the fewest batches before it; among equals in turn, so that none stays cold under a light load."""
        best: Lane | None = None
        fewest = 0
        for lane in self._lanes:
            if lane.has_place(full=full):
                under_way = lane.under_way
                if best is None or under_way < fewest:
                    best, fewest = lane, under_way
                if not under_way:
                    break
        if best is not None and len(self._lanes) > 1:
            self._lanes.remove(best)
            self._lanes.append(best)
        return best

    def _take(self) -> list[Request]:
        """Up to a batch of requests whose clients still wait, all of one operation. One that is tried again travels alone.

        It may be what killed its last worker, and then shall not take others along. Handlers for TorchServe ask the first
        request of a batch whether to predict or to explain, and describe a batch of one.
        """
        now = self._clock.time()
        batch: list[Request] = []
        operation = ""
        while self._queue and len(batch) < self._batch_size:
            request = self._queue[0]
            if not batch:
                operation = request.meta.operation
            elif request.attempts or request.meta.operation != operation or operation == DESCRIBE:
                break
            self._queue.popleft()
            if request.deadline <= now:
                request.fail(self._too_late(request))
            elif not request.reply.done():
                batch.append(request)
                if request.attempts:
                    break
        if batch:
            self._measure(batch)
        return batch

    def _measure(self, batch: list[Request]) -> None:
        """How long each has waited: for company until the batch was full or the oldest's time was up, then for a place."""
        now, due = self.meters.now(), 0.0
        if self._max_delay and self._batch_size > 1:
            last = batch[-1].entered if len(batch) == self._batch_size else batch[0].entered + self._max_delay
            due = min(last, now)
        for request in batch:
            request.sent = now
        self.meters.left_queue([request.entered for request in batch], due, now)

    def _may_wait_again(self, request: Request, begun: bool) -> bool:
        if request.reply.done() or request.stream is not None or self._refusal is not None:
            return False
        return (not begun or request.attempts < self._retries) and request.deadline > self._clock.time()

    def _full(self) -> QueueFull:
        error = QueueFull(
            f"{no_workers(self._model)}: {len(self._queue)} requests wait already, jobQueueSize allows no more"
        )
        rate = self._rate.per_second()
        error.retry_after = len(self._queue) / rate if rate else None
        return error

    def _expire(self) -> None:
        """Answers whatever has passed its deadline. In flight that frees no place: the ranks still work on it."""
        now = self._clock.time()
        late = [request for request in self._live if request.deadline <= now]
        for request in late:
            request.fail(self._too_late(request))
        if late:
            self._queue = deque(request for request in self._queue if request.deadline > now)
        self._deadline_alarm.at(
            min((request.deadline for request in self._live if request.deadline > now), default=math.inf)
        )

    def _too_late(self, request: Request) -> DeadlineExceeded:
        where = f"{request.worker} is still at work on it" if request.worker else "it was still in the queue"
        return DeadlineExceeded(f'Model "{self._model}": no answer within the request\'s deadline; {where}')
