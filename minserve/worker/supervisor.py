"""Decides about the workers of a model version: how many, of which spec, and whether there is any point any more."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from minserve.errors import Draining, MinServeError, ModelUnhealthy, NoWorkers, WorkerFailed
from minserve.telemetry.events import EventKind
from minserve.worker.autoscaling import Autoscaler
from minserve.worker.crew import Crew
from minserve.worker.scaling import Scaler
from minserve.worker.starting import Starting
from minserve.worker.states import State

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from minserve.dispatch.dispatcher import Dispatcher
    from minserve.telemetry.events import EventLog
    from minserve.worker.devices import DeviceAllocator
    from minserve.worker.keeper import Keeper
    from minserve.worker.reports import WorkerReport
    from minserve.worker.spec import ModelSpec
    from minserve.worker.starter import Starter
    from minserve.worker.worker import Worker

logger = logging.getLogger(__name__)


class Supervisor:
    """Runs between `count` and maxWorkers workers of one model version. With no worker at all requests are refused.

    Args:
        on_change: called when a worker's state has changed, for those who watch the start.
    """

    def __init__(
        self,
        spec: ModelSpec,
        count: int,
        directory: Path,
        dispatcher: Dispatcher,
        devices: DeviceAllocator,
        starter: Starter,
        events: EventLog,
        on_change: Callable[[], None],
    ) -> None:
        self._spec = spec
        self._dispatcher = dispatcher
        self._events = events
        self._crew = Crew(directory, dispatcher, devices, starter, events, self._given_up, self._changed)
        self._on_change = on_change
        self._starting = Starting(self._crew)
        self._autoscaler = Autoscaler(spec.name, self._crew, dispatcher, events, self._revive)
        self._scaler = _scaler(spec, count, spec.config.max_workers_or(count))
        self._verdict: WorkerFailed | None = None
        self._change: asyncio.Task[None] | None = None
        self._stopping = False

    # ── its life, in order ──

    def start(self) -> None:
        """Begins to start the workers."""
        self._starting.expect(self._scaler.fewest)
        self._crew.begin(self._spec, self._scaler.fewest)
        self._admit()
        self._resume_scaling()

    async def started(self) -> None:
        """Waits until as many workers are READY as there are at the fewest.

        Raises:
            WorkerFailed: of one that is not READY and has failed since `start`, or since the last `resize`. It is started
                again all the same.
            Draining: the model is stopped.
        """
        await self._starting.wait()

    async def resize(self, fewest: int, most: int) -> None:
        """Runs between `fewest` and `most` workers from now on; with `fewest` 0 none.

        Begins to start what is missing, at once and for as long as that takes, also in the place of workers that were given
        up; what is too many leaves once it has finished what it has in flight. Not while a `replace` is under way.

        Raises:
            Draining: the server is stopping.
        """
        assert self._change is None or self._change.done()
        await _cancel(self._autoscaler.task)
        if self._stopping:
            raise Draining(f'Model "{self._spec.name}": the server is shutting down')
        crew, most = self._crew, most if fewest else 0
        self._scaler = _scaler(self._spec, fewest, most)
        for keeper in list(crew.in_charge):
            if keeper.given_up is not None:
                crew.let_go(keeper, 0.0)
        before = len(crew.in_charge)
        # Those that serve stay, and among them the busiest.
        by_use = sorted(crew.in_charge, key=_use)
        for keeper in by_use[: max(0, before - most)]:
            crew.let_go(keeper, self._spec.longest_drain)
        self._starting.expect(fewest)
        crew.begin(self._spec, max(0, fewest - before))
        after = len(crew.in_charge)
        if before != after:
            self._autoscaler.tell(f"{before} → {after} workers: asked for {fewest} to {most}")
        self._verdict = None
        self._admit()
        self._resume_scaling()

    async def replace(self, spec: ModelSpec, count: int) -> None:
        """Puts workers of another spec, or of the same anew, in the place of those there are. One call at a time.

        The new ones are READY before the old ones take no more batches. Where both cannot live at once, for want of devices
        or because of a fixed rendezvous, the old ones leave first and requests wait in the queue. Revives a model that was
        given up. The old ones may still be finishing what they have in flight, see `settled`.

        Raises:
            WorkerFailed: a new worker could not be started. The old ones go on, or are started again.
            Draining: the server is stopping.
        """
        assert self._change is None or self._change.done()
        if not self._stopping:
            change = self._change = asyncio.create_task(self._replace(spec, count))
            try:
                await asyncio.wait([change])
            except asyncio.CancelledError:
                change.cancel()
                raise
            if not change.cancelled():
                return change.result()
        raise Draining(f'Model "{self._spec.name}": the server is shutting down')

    async def settled(self) -> None:
        """Waits until the workers that leave have ended."""
        await self._crew.settled()

    async def stop(self, drain_timeout: float, refusal: MinServeError | None = None) -> None:
        """Refuses what waits and what still comes, lets finish what is in flight, and ends every worker.

        Cancelling it ends them at once, and waits for that, too.

        Args:
            refusal: what those get who still come; by default that the server is shutting down.
        """
        self._stopping = True
        refusal = refusal or Draining(f'Model "{self._spec.name}": the server is shutting down')
        self._dispatcher.refuse(refusal)
        self._starting.end(refusal)
        try:
            await _cancel(self._change, self._autoscaler.task)
            await self._crew.stop(drain_timeout)
        except asyncio.CancelledError:
            await _cancel(self._change, self._autoscaler.task)
            await self._crew.kill()
            raise

    # ── for health and operators ──

    @property
    def unhealthy(self) -> MinServeError | None:
        """Why no worker will serve any more, None while one does or may."""
        return self._verdict

    @property
    def not_ready(self) -> str | None:
        """Why no worker takes batches just now; None while one does, and where none is asked for."""
        if self._verdict is not None:
            return str(self._verdict)
        if self._crew.serving or (self._scaler.fewest == 0 and not self._stopping):
            return None
        workers = [
            f"{self._spec.title}/{report.number} is {report.state}"
            + (f", its last error was: {report.last_error}" if report.last_error else "")
            for report in self.report()
        ]
        return "; ".join(workers) or f"{self._spec.name} has no worker"

    def report(self) -> list[WorkerReport]:
        """Every worker, by number."""
        return self._crew.report()

    def worker(self, number: int) -> Worker | None:
        """The worker of that number, unless it is leaving."""
        return self._crew.find(number)

    # ── a worker is given up ──

    def _given_up(self, keeper: Keeper, error: WorkerFailed) -> None:
        if all(other.given_up is not None for other in self._crew.in_charge):
            self._condemn(error)
        elif len(self._crew.in_charge) > self._scaler.fewest:  # it was added, and the model does without it
            self._crew.let_go(keeper, 0.0)
            self._autoscaler.tell(f"{keeper.worker.who} is dropped: {error}; next try in {self._scaler.failed():g} s")

    def _changed(self) -> None:
        self._starting.look()
        self._on_change()

    # ── admission ──

    def _admit(self) -> None:
        """Where no worker is asked for requests are refused at once: nobody would ever take them."""
        if self._scaler.fewest == 0:
            self._dispatcher.refuse(NoWorkers(self._spec.name))
        else:
            self._dispatcher.admit()

    def _revive(self) -> bool:
        """A worker serves again, whatever was said before. Returns whether the model had been given up."""
        if self._verdict is None:
            return False
        self._verdict = None
        self._dispatcher.admit()
        self._events.record(EventKind.REVIVED, "a new worker is ready")
        return True

    def _condemn(self, error: WorkerFailed) -> None:
        self._verdict = error
        self._dispatcher.refuse(ModelUnhealthy(f'Model "{self._spec.name}" is unhealthy: {error}'))

    # ── another spec ──

    async def _replace(self, spec: ModelSpec, count: int) -> None:
        await _cancel(self._autoscaler.task)
        try:
            await self._start_others(spec, count)
        except WorkerFailed as error:
            self._events.record(EventKind.RELOAD_FAILED, str(error))
            raise
        finally:
            self._resume_scaling()

    async def _start_others(self, spec: ModelSpec, count: int) -> None:
        crew, scaler = self._crew, _scaler(spec, count, spec.config.max_workers_or(count))
        drain_timeout = self._spec.longest_drain
        await crew.settled()  # those that leave may hold devices
        before = len(crew.in_charge)
        wanted = max(count, min(before, scaler.most))  # the load that has needed so many goes on
        others = [] if before and _one_at_a_time(spec, self._spec) else crew.recruit(spec, wanted)
        beside = bool(others) and crew.reserve(others)
        if not beside:
            if before:
                logger.info("%s: the old workers leave before the new ones start", spec.name)
            self._dismiss_all(drain_timeout)
            await crew.settled()
            others = crew.recruit(spec, wanted)
        try:
            if others:
                await crew.start(others)
        except WorkerFailed as error:
            if self._verdict is not None or (not before and self._scaler.fewest):
                self._condemn(error)
            elif not beside:
                await crew.settled()
                crew.begin(self._spec, before)
            raise
        self._dismiss_all(drain_timeout)
        config = spec.config
        retries = config.minserve.retry_in_flight
        adaptive = config.minserve.batching == "adaptive"
        self._dispatcher.configure(
            config.batch_size, config.max_batch_delay / 1000, spec.queue_limit, retries, adaptive=adaptive
        )
        crew.take_over(others)
        self._spec, self._scaler = spec, scaler
        self._starting.expect(scaler.fewest)
        self._starting.look()
        if not self._revive():
            self._admit()
            self._events.record(EventKind.RELOADED, f"with {wanted} new workers")

    def _dismiss_all(self, drain_timeout: float) -> None:
        for keeper in list(self._crew.in_charge):
            self._crew.let_go(keeper, drain_timeout)

    def _resume_scaling(self) -> None:
        if not self._stopping:
            self._autoscaler.resume(self._spec, self._scaler)


def _scaler(spec: ModelSpec, fewest: int, most: int) -> Scaler:
    config = spec.config
    up_wait = config.minserve.scale_up_wait + config.max_batch_delay / 1000  # to wait for company is no sign of load
    return Scaler(asyncio.get_running_loop(), fewest, most, up_wait, config.minserve.scale_down_idle)


def _use(keeper: Keeper) -> tuple[bool, bool, float]:
    """What is lost when a worker leaves: the least first."""
    worker = keeper.worker
    return worker.serving, worker.state is State.BUSY, -keeper.idle()


def _one_at_a_time(*specs: ModelSpec) -> bool:
    """Whether the ranks of all of them meet at a fixed address: two groups would find each other's ranks there."""
    return all(
        spec.config.is_parallel
        and (spec.config.torchrun.rdzv_endpoint is not None or spec.config.torchrun.rdzv_backend != "c10d")
        for spec in specs
    )


async def _cancel(*tasks: asyncio.Task[None] | None) -> None:
    running = [task for task in tasks if task is not None and not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)
