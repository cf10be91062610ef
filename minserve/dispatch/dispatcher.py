"""The queue of one model version, and when a batch is cut from it.

Batches are cut late. A request stays in the queue, where its deadline and its client's leaving can still take it out, until
a worker has a free place. Then a batch is cut at once if `batch_size` requests wait; one with fewer may wait for company:
see `patience`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from typing import TYPE_CHECKING

from minserve.dispatch.clock import Alarm
from minserve.dispatch.lanes import Lanes
from minserve.dispatch.patience import Patience
from minserve.dispatch.rate import Rate
from minserve.errors import DeadlineExceeded, MinServeError, QueueFull, no_workers
from minserve.telemetry.meters import unwatched

if TYPE_CHECKING:
    from minserve.dispatch.clock import Clock
    from minserve.dispatch.lanes import Lane
    from minserve.dispatch.request import Reply, Request
    from minserve.telemetry.meters import ModelMeters
    from minserve.wire.arena import Arena

logger = logging.getLogger(__name__)

DESCRIBE = "describe"  # the operation of a request that asks about the model, and is counted nowhere


class Dispatcher:
    """Bounded queue in front of the workers of one model version.

    Args:
        model: name for messages.
        batch_size: most requests in a batch.
        max_delay: seconds the oldest request may wait for company; 0 means none waits.
        adaptive: it waits only while that pays, see `Patience`.
        queue_limit: most requests that wait; those being worked on do not count.
        retries: how often a request is sent again whose worker failed with it in flight.

    Attributes:
        meters: of the model version, for all who have a share in its requests.
        arena: where those put its large bodies; None: they travel in frames.
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
        arena: Arena | None = None,
        *,
        adaptive: bool = True,
    ) -> None:
        self._clock = clock
        self.meters = unwatched() if meters is None else meters
        self.arena = arena
        self._model = model
        self._batch_size = batch_size
        self._patience = Patience(max_delay, adaptive=adaptive)
        self._adaptive = adaptive
        self._waits = False  # a place is free, and a batch waits for company
        self._queue_limit = queue_limit
        self._retries = retries
        self._rate = Rate(clock)
        self._queue: deque[Request] = deque()
        self._live: set[Request] = set()  # queued and in flight
        self._lanes = Lanes()
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
        if self._batch_size > 1 and self._patience.max_delay:
            self._patience.arrived(request.arrived)
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

    def configure(self, batch_size: int, max_delay: float, queue_limit: int, retries: int, *, adaptive: bool) -> None:
        """Takes over changed options; what waits already stays."""
        self._batch_size, self._queue_limit = batch_size, queue_limit
        self._patience, self._adaptive = Patience(max_delay, adaptive=adaptive), adaptive
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
        self._lanes.add(lane)
        self.wake()

    def detach(self, lane: Lane) -> None:
        """A worker takes no more batches."""
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
            full = len(self._queue) >= self._batch_size
            lane = self._lanes.next(full=full)
            if lane is None or (not full and self._waits_for_company(lane)):
                return
            batch, late = self._take()
            self._waits = False
            if batch:
                self._send(lane, batch)
            for request in late:  # only now: who is told may ask again at once, which comes back to here
                request.fail(self._too_late(request))

    def _waits_for_company(self, lane: Lane) -> bool:
        """Whether the requests in the queue, too few for a full batch, wait for more though this lane has a place."""
        if not self._patience.max_delay or self._queue[0].attempts:
            return False
        due = self._patience.until(
            len(self._queue),
            self._queue[0].arrived,
            self._lanes.seconds_to_a_place(lane),
            last_place=self._lanes.is_last_place(lane),
        )
        if due <= self._clock.time():
            return False
        self._waits = True
        self._cut_alarm.at(due)
        return True

    def _send(self, lane: Lane, batch: list[Request]) -> None:
        self._lanes.takes(lane)
        try:
            lane.send(batch)
        except MinServeError as error:
            for request in batch:
                request.fail(error)
        except Exception:  # nothing in a request may do this; if it does, its clients shall know
            logger.exception("%s: a batch could not be sent", self._model)
            for request in batch:
                request.fail(MinServeError(f'Model "{self._model}": the request could not be sent to the ranks'))

    def _take(self) -> tuple[list[Request], list[Request]]:
        """Up to a batch of requests whose clients still wait, all of one operation. One that is tried again travels alone.

        It may be what killed its last worker, and then shall not take others along. Handlers for TorchServe ask the first
        request of a batch whether to predict or to explain, and describe a batch of one.

        Returns:
            The batch, and those that were in front of it and whose deadline has passed.
        """
        now = self._clock.time()
        batch: list[Request] = []
        late: list[Request] = []
        operation = ""
        while self._queue and len(batch) < self._batch_size:
            request = self._queue[0]
            if not batch:
                operation = request.meta.operation
            elif request.attempts or request.meta.operation != operation or operation == DESCRIBE:
                break
            self._queue.popleft()
            if request.deadline <= now:
                late.append(request)
            elif not request.reply.done():
                batch.append(request)
                if request.attempts:
                    break
        if batch:
            self._measure(batch)
        return batch, late

    def _measure(self, batch: list[Request]) -> None:
        """How long each has waited: for company, and for a place."""
        now = self.meters.now()
        due = self._company_until(batch, now) if self._patience.max_delay and self._batch_size > 1 else 0.0
        for request in batch:
            request.sent = now
        self.meters.left_queue([request.entered for request in batch], due, now)

    def _company_until(self, batch: list[Request], now: float) -> float:
        """When they no longer waited for company, but for a place; 0: they never did."""
        if self._adaptive:  # the place was there
            return now if self._waits else 0.0
        last = batch[-1].entered if len(batch) == self._batch_size else batch[0].entered + self._patience.max_delay
        return min(last, now)

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
