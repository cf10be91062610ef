"""Keeps one worker running: starts it, and again with back-off when it has failed, until there is no point any more."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from typing import TYPE_CHECKING

from minserve.errors import WorkerFailed
from minserve.telemetry.events import EventKind
from minserve.worker.fingerprint import read_fingerprint
from minserve.worker.retry import SAME_LOAD_ERRORS, RetryWindow, SameLoadError
from minserve.worker.states import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from minserve.telemetry.events import EventLog
    from minserve.worker.spec import ModelSpec
    from minserve.worker.worker import Worker

logger = logging.getLogger(__name__)

UNKNOWN_START_S = 5.0  # what a start may take, as long as none has succeeded


class Keeper:
    """Keeps one worker running.

    Either `begin`, which starts it for as long as it takes; or `try_start`, and if that went well `take_over`.

    Args:
        on_change: called when the worker's state has changed.
        on_given_up: called when it will not be restarted any more.

    Attributes:
        given_up: the reason why it is not restarted any more.
    """

    def __init__(
        self,
        worker: Worker,
        spec: ModelSpec,
        events: EventLog,
        on_change: Callable[[], None],
        on_given_up: Callable[[Keeper, WorkerFailed], None],
    ) -> None:
        self.worker = worker
        self.given_up: WorkerFailed | None = None
        self._spec = spec
        self._events = events
        self._on_change = on_change
        self._on_given_up = on_given_up
        self._loop = asyncio.get_running_loop()
        config = spec.config
        self._window = RetryWindow(
            *(self._loop, config.minserve.backoff, config.max_retry_timeout_in_sec, config.minserve.stable_period),
            config.torchrun.max_restarts,
        )
        self._same_error = SameLoadError()
        self._start_seconds = UNKNOWN_START_S
        self._task: asyncio.Task[None] | None = None
        self._idle_since = self._loop.time()
        self._sent = 0

    # ── its life, in order ──

    def begin(self) -> None:
        """Starts the worker, as often as it takes."""
        self._task = asyncio.create_task(self._keep(ready=False))

    def try_start(self) -> asyncio.Task[None]:
        """Starts the worker once. The task ends with a WorkerFailed if that fails."""
        self._task = asyncio.create_task(self._start())
        return self._task

    def take_over(self) -> None:
        """The worker is READY: it takes batches from now on, and is restarted when it fails."""
        self._begin_serving()
        self._task = asyncio.create_task(self._keep(ready=True))

    def dismiss(self) -> None:
        """No more batches and no more restarts. What is in flight goes on; a start under way ends."""
        self.worker.retire()
        if self._task is not None:
            self._task.cancel()

    async def stop(self, drain_timeout: float) -> None:
        """Dismisses the worker, lets finish what is in flight, and ends it. Cancelling it ends the worker at once."""
        try:
            await self._dismissed()
            await self.worker.stop(drain_timeout)
        except asyncio.CancelledError:
            await self.kill()
            raise

    async def kill(self) -> None:
        """Ends the worker at once."""
        await self._dismissed()
        await self.worker.kill()

    async def _dismissed(self) -> None:
        self.dismiss()
        if self._task is not None:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.exception()  # of a start that nobody waits for any more

    # ── for the supervisor ──

    def comeback(self, served: bool) -> float | None:
        """Seconds until the worker is READY again if it fails just now, as far as one can tell. None: never."""
        delay = self._window.delay(served)
        return None if delay is None else delay + self._start_seconds

    def idle(self) -> float:
        """Seconds since a call of this found the worker with something to do."""
        now = self._loop.time()
        if self.worker.sent != self._sent or self.worker.state is not State.READY:
            self._sent = self.worker.sent
            self._idle_since = now
        return now - self._idle_since

    # ── inside ──

    def _begin_serving(self) -> None:
        self._window.ready()
        self._same_error.ready()
        self._idle_since = self._loop.time()
        self.worker.serve()
        self._on_change()

    async def _start(self) -> None:
        began = self._loop.time()
        try:
            await self.worker.start()
        finally:
            self._on_change()
        self._start_seconds = self._loop.time() - began
        self._events.record(EventKind.READY, f"ready after {self._start_seconds:.1f} s", self.worker.number)

    async def _keep(self, ready: bool) -> None:
        delay: float | None = 0.0
        while delay is not None:
            try:
                error, files = await self._live(ready)
            except Exception as unforeseen:  # without this the model would stay as it is for ever
                logger.exception("%s: unforeseen", self.worker.who)
                error, files = WorkerFailed(f"{self.worker.who}: {type(unforeseen).__name__}: {unforeseen}"), ""
                self._events.record(EventKind.START_FAILED, str(error), self.worker.number)
                with contextlib.suppress(Exception):  # it has been told
                    await self.worker.stop(0.0)
            ready = False
            self._on_change()
            gc.collect()  # a group that has ended is all cycles, with its links' buffers; by itself it would come late
            delay, verdict = self._window.failed(self.worker.served), ""
            if self._same_error.failed(error.load_error, files):
                delay, verdict = None, f" ({SAME_LOAD_ERRORS} starts in a row, and no file of the model has changed)"
            if delay is None:
                self._give_up(WorkerFailed(f"{error}{verdict}", error.last_lines, error.load_error))
            else:
                logger.info("%s: restart in %g s", self.worker.who, delay)
                self._events.record(EventKind.RESTART, f"restart in {delay:g} s", self.worker.number)
                await asyncio.sleep(delay)

    async def _live(self, ready: bool) -> tuple[WorkerFailed, str]:
        """One life of the worker, from its start unless it is READY already. Returns its end and the files' fingerprint."""
        try:
            if not ready:
                await self._start()
                self._begin_serving()
            error = await self.worker.failed()
        except WorkerFailed as failure:
            error = failure
        return error, await read_fingerprint(self._spec.model_dir) if error.load_error else ""

    def _give_up(self, error: WorkerFailed) -> None:
        self.given_up = error
        self.worker.release()  # another worker may have the devices
        logger.error("%s: given up: %s", self.worker.who, error)
        self._events.record(EventKind.GIVEN_UP, str(error), self.worker.number)
        self._on_given_up(self, error)
        self._on_change()
