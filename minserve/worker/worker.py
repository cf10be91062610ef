"""A worker: one place in a model's set of rank groups. It fills the place, and empties it; when, its keeper decides."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from minserve.errors import WorkerFailed
from minserve.worker.devices import NoDevicesError
from minserve.worker.faults import kind_of_fault
from minserve.worker.group import RankGroup
from minserve.worker.reports import RankReport, WorkerReport
from minserve.worker.states import State, Trigger, after

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from minserve.dispatch.dispatcher import Dispatcher
    from minserve.dispatch.request import Request
    from minserve.telemetry.events import EventKind, EventLog
    from minserve.worker.devices import DeviceAllocator, Devices
    from minserve.worker.recorder import Recorder
    from minserve.worker.spec import ModelSpec
    from minserve.worker.starter import Starter

logger = logging.getLogger(__name__)


class Worker:
    """Keeps at most one rank group alive. `start` brings it to READY, `failed` tells its end, `stop` ends it.

    Args:
        number: unlike that of any other worker of the model version; fixes its endpoints.
        directory: the model version's runtime directory.
        dispatcher: where the requests come from, once `serve` is called.

    Attributes:
        who: "model/number" for messages, "model:version/number" for a version that is not the usual one.
        comeback: tells, in how many seconds it will be READY again when its group fails now, None if never; the argument
            says whether the group has carried a batch through. Requests in flight are told when to try again.
        sent: batches that it was given.
    """

    def __init__(
        self,
        spec: ModelSpec,
        number: int,
        directory: Path,
        dispatcher: Dispatcher,
        devices: DeviceAllocator,
        starter: Starter,
        events: EventLog,
    ) -> None:
        self._spec = spec
        self.number = number
        self._directory = directory
        self._dispatcher = dispatcher
        self._allocator = devices
        self._starter = starter
        self._events = events
        self.who = f"{spec.title}/{number}"
        self.comeback: Callable[[bool], float | None] = lambda served: None
        self.sent = 0
        self._state = State.STOPPED
        self._group: RankGroup | None = None
        self._devices: Devices | None = None
        self._started_at = 0.0
        self._starts = 0
        self._last_error: WorkerFailed | None = None
        self._last_error_at = 0.0
        self._served = False
        self._drained = asyncio.Event()
        self._recorder: Recorder | None = None

    @property
    def state(self) -> State:
        """Its state; BUSY and a failure that nobody has attended to yet are looked up."""
        if self._state is State.READY and self._group is not None:
            if self._group.failed.done():
                return State.FAILED
            if self._group.busy:
                return State.BUSY
        return self._state

    @property
    def serving(self) -> bool:
        """Whether its rank group takes batches, and nothing is known to be wrong with it."""
        return self.state in (State.READY, State.BUSY) and self._group is not None and not self._group.suspected

    @property
    def addresses(self) -> range:
        """The numbers in the names of its endpoints. Two workers that live at one time must have none in common."""
        first = self.number * self._spec.world_size
        return range(first, first + self._spec.world_size)

    # ── its life, in order ──

    def reserve(self) -> None:
        """Takes the devices of the start to come.

        Raises:
            NoDevicesError: too few are free.
        """
        self._devices = self._allocator.reserve(self.who, self._spec.config, self._spec.world_size)

    async def start(self) -> None:
        """From STARTING to READY. It takes no batches before `serve`.

        Raises:
            WorkerFailed: with the culprit. The worker is FAILED then and nothing of it runs any more.
        """
        self._on(Trigger.START)
        self._starts += 1
        self._started_at = time.time()
        options = self._spec.config.minserve
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await self._end_group()  # there is one if its end went wrong
            self.reserve()
            assert self._devices is not None
            self._group = RankGroup(
                *(self._spec, self.who, self.number, self._directory, self._devices, self._starter),
                *(self._on_free, self._dispatcher.retry, self._happened, self._dispatcher.meters),
                self._dispatcher.arena,
            )
            self._group.failed.add_done_callback(self._set_retry_after)
            await self._group.launch()
            self._on(Trigger.LAUNCHED)
            await self._group.connect(min(options.accept_timeout, self._spec.startup_timeout))
            self._on(Trigger.CONNECTED)
            await self._group.load(max(0.0, began + self._spec.startup_timeout - loop.time()))
            if self._recorder is not None:
                self._group.record(self._recorder)
        except WorkerFailed as error:
            await self._fail(error)
            raise
        except Exception as error:  # no devices, no file descriptors, a full disk: a reason as good as any other
            text = str(error)
            if not isinstance(error, NoDevicesError):
                logger.exception("%s: unforeseen", self.who)
                text = f"{self.who}: {type(error).__name__}: {error}"
            failure = WorkerFailed(text)
            await self._fail(failure)
            raise failure from None
        except BaseException:
            await self._end_group()
            self.release()
            self._on(Trigger.ENDED)
            raise
        self._on(Trigger.LOADED)
        self._dispatcher.meters.loaded(self.number, loop.time() - began)
        logger.info("%s: ready after %.1f s", self.who, loop.time() - began)

    def serve(self) -> None:
        """READY, and from now on batches may come."""
        self._dispatcher.attach(self)

    def retire(self) -> None:
        """No more batches come; what is in flight goes on."""
        self._dispatcher.detach(self)

    async def failed(self) -> WorkerFailed:
        """Waits until a READY worker fails, and cleans up after it."""
        assert self._group is not None
        error = await asyncio.shield(self._group.failed)
        await self._fail(error)
        return error

    def release(self) -> None:
        """Gives the devices back. Not between restarts: a single-process worker might sit down on one meanwhile."""
        self._allocator.release(self.who)
        self._devices = None

    async def stop(self, drain_timeout: float) -> None:
        """Lets what is in flight finish, then ends the group. In any state; STOPPED afterwards.

        Cancelling it ends the group at once.
        """
        self.retire()
        try:
            if self._on(Trigger.DRAIN) and self._group is not None:
                await self._drain(self._group, drain_timeout)
                if self._group.failed.done():
                    self._tell(self._group.failed.result())
                await self._group.end(self._spec.config.minserve.exit_timeout)
        finally:
            await self.kill()

    async def kill(self) -> None:
        """Ends the group at once. In any state; STOPPED afterwards."""
        self.retire()
        await self._end_group()
        self.release()
        self._on(Trigger.ENDED)
        if self._recorder is not None:
            self._recorder.close(f"{self.who} was stopped")

    @property
    def served(self) -> bool:
        """Whether the rank group that failed last had carried a batch through."""
        return self._served

    # ── a lane of the dispatcher ──

    def has_place(self, *, full: bool = True, ahead: int = 0) -> bool:
        """Whether a batch may be sent now, see `Lane`."""
        return self._state is State.READY and self._group is not None and self._group.has_place(full=full, ahead=ahead)

    @property
    def batch_seconds(self) -> float | None:
        """How long a batch usually takes; None before the first."""
        return self._group.batch_seconds if self._group is not None else None

    @property
    def under_way(self) -> int:
        """How many batches are."""
        return self._group.under_way if self._group is not None else 0

    def send(self, requests: list[Request]) -> None:
        """Sends a batch to all ranks."""
        assert self._group is not None
        self.sent += 1
        self._group.send(requests)

    # ── for operators ──

    @property
    def last_error(self) -> WorkerFailed | None:
        """Why its last rank group that failed did."""
        return self._last_error

    def report(self) -> WorkerReport:
        """What it is doing, for `/models/{model}` and `minserve status`."""
        group, error = self._group, self._last_error
        addresses = group.endpoints.addresses if group is not None and group.endpoints is not None else []
        return WorkerReport(
            number=self.number,
            state=self.state,
            started_at=self._started_at,
            restarts=max(0, self._starts - 1),
            devices=self._devices.mask if self._devices is not None else None,
            agent_pid=group.agent_pid if group is not None else 0,
            ranks=tuple(
                RankReport(rank, group.pids.get(rank, 0), address, group.stage(rank))
                for rank, address in enumerate(addresses)
                if group is not None
            ),
            last_error=str(error) if error is not None else "",
            last_error_at=self._last_error_at,
            last_lines=error.last_lines if error is not None else (),
            answers_held=group.answers_held if group is not None else 0,
        )

    def attach_recorder(self, recorder: Recorder) -> bool:
        """From now on every batch is recorded, also those after a restart. False: there is a recorder already."""
        if self._recorder is not None:
            return False
        self._recorder = recorder
        if self._group is not None:
            self._group.record(recorder)
        return True

    def detach_recorder(self) -> None:
        """Nothing is recorded any more."""
        self._recorder = None
        if self._group is not None:
            self._group.record(None)

    # ── inside ──

    def _on(self, trigger: Trigger) -> bool:
        """Changes the state as the table says. Returns whether it is another one now."""
        before, self._state = self._state, after(self._state, trigger)
        logger.debug("%s: %s: %s → %s", self.who, trigger, before, self._state)
        return self._state is not before

    def _set_retry_after(self, failed: asyncio.Future[WorkerFailed]) -> None:
        # The group sets `failed` before it answers its requests, and a loop calls back in that order: the clients that
        # wait for those answers read this number afterwards.
        if not failed.cancelled() and self._group is not None:
            failed.result().retry_after = self.comeback(self._group.served)

    def _on_free(self) -> None:
        if self._state is State.DRAINING and self._group is not None and not self._group.busy:
            self._drained.set()
        self._dispatcher.wake()

    async def _drain(self, group: RankGroup, timeout: float) -> None:
        if not group.busy or group.failed.done():
            return
        self._drained.clear()
        waiter: asyncio.Future[object] = asyncio.ensure_future(self._drained.wait())
        either: list[asyncio.Future[object]] = [waiter, group.failed]  # type: ignore[list-item]  # only waited for
        try:
            await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()

    async def _fail(self, error: WorkerFailed) -> None:
        self.retire()
        self._served = self._group is not None and self._group.served
        self._tell(error)
        self._on(Trigger.FAIL)  # before the kill: nobody shall take it for READY meanwhile
        await self._end_group()

    def _tell(self, error: WorkerFailed) -> None:
        self._last_error, self._last_error_at = error, time.time()
        cause = self._group.cause if self._group is not None else None
        rank, pid = (cause.rank, cause.pid) if cause is not None else (None, 0)
        self._events.record(kind_of_fault(cause, self._state), str(error), self.number, rank, pid)
        logger.error("%s%s", error, "".join(f"\n    {line}" for line in error.last_lines))

    def _happened(self, kind: EventKind, detail: str, rank: int, pid: int) -> None:
        self._events.record(kind, detail, self.number, rank, pid)

    async def _end_group(self) -> None:
        if self._group is not None:
            await asyncio.shield(self._group.kill())
            self._group = None
