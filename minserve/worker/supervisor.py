"""Keeps a model version's workers running: restarts with back-off, and says when there is no point any more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from minserve.errors import Draining, MinServeError, ModelUnhealthy, WorkerFailed
from minserve.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from minserve.dispatch.clock import Clock
    from minserve.dispatch.dispatcher import Dispatcher
    from minserve.worker.devices import DeviceAllocator
    from minserve.worker.spec import ModelSpec
    from minserve.worker.worker import WorkerReport

logger = logging.getLogger(__name__)


class RetryWindow:
    """How often and how long a worker is restarted.

    The window opens with a worker's first failure and closes when it has carried a batch through, or has been READY for
    `stable` seconds: one that serves between failures is worth restarting, one that only loads is not. The steps of the
    back-off begin anew after `stable` seconds alone.

    Args:
        steps: seconds to wait before each restart; the last one repeats.
        window: seconds of failing after which restarts end.
        stable: seconds in READY after which earlier failures are forgotten.
        most: most restarts in one window, None for any number.
    """

    def __init__(self, clock: Clock, steps: Sequence[float], window: float, stable: float, most: int | None) -> None:
        self._clock = clock
        self._steps = steps
        self._window = window
        self._stable = stable
        self._most = most
        self._opened: float | None = None
        self._ready_since: float | None = None
        self._restarts = 0
        self._step = 0

    def ready(self) -> None:
        """The worker has become READY."""
        self._ready_since = self._clock.time()

    def failed(self, served: bool) -> float | None:
        """The worker has failed.

        Args:
            served: whether it had carried a batch through since it became READY.

        Returns:
            Seconds to wait before the restart; None if there shall be none.
        """
        now = self._clock.time()
        stable = self._ready_since is not None and now - self._ready_since >= self._stable
        self._ready_since = None
        if stable:
            self._step = 0
        if stable or served or self._opened is None:
            self._opened = now
            self._restarts = 0
        if now - self._opened >= self._window or (self._most is not None and self._restarts >= self._most):
            return None
        delay = self._steps[min(self._step, len(self._steps) - 1)]
        self._step += 1
        self._restarts += 1
        return min(delay, self._opened + self._window - now)


class Supervisor:
    """Runs `count` workers of one model version.

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
        environ: Mapping[str, str],
        on_change: Callable[[], None],
    ) -> None:
        self._spec = spec
        self._dispatcher = dispatcher
        self._on_change = on_change
        self._workers = [Worker(spec, number, directory, dispatcher, devices, environ) for number in range(count)]
        self._tasks: list[asyncio.Task[None]] = []
        self._given_up: dict[Worker, WorkerFailed] = {}

    # ── its life, in order ──

    def start(self) -> None:
        """Begins to start the workers."""
        self._tasks = [asyncio.create_task(self._keep(worker)) for worker in self._workers]

    async def stop(self, drain_timeout: float) -> None:
        """Refuses what waits and what still comes, lets finish what is in flight, and ends every worker."""
        self._dispatcher.refuse(Draining(f'Model "{self._spec.name}": the server is shutting down'))
        await asyncio.gather(
            *(self._stop(worker, task, drain_timeout) for worker, task in zip(self._workers, self._tasks, strict=True))
        )

    async def _stop(self, worker: Worker, task: asyncio.Task[None], drain_timeout: float) -> None:
        task.cancel()  # no more restarts; a start under way ends here, a READY worker does not notice
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await worker.stop(drain_timeout)

    # ── for health and operators ──

    @property
    def unhealthy(self) -> MinServeError | None:
        """Why no worker will serve any more, None while one does or may."""
        if len(self._given_up) < len(self._workers):
            return None
        return next(iter(self._given_up.values()), None)

    def report(self) -> list[WorkerReport]:
        """Every worker, by number."""
        return [worker.report() for worker in self._workers]

    # ── inside ──

    async def _keep(self, worker: Worker) -> None:
        config = self._spec.config
        window = RetryWindow(
            asyncio.get_running_loop(),
            config.minserve.backoff,
            config.max_retry_timeout_in_sec,
            config.minserve.stable_period,
            config.torchrun.max_restarts,
        )
        while True:
            try:
                await worker.start()
                window.ready()
                self._on_change()
                error = await worker.failed()
            except WorkerFailed as failure:
                error = failure
            except Exception as unforeseen:
                logger.exception("%s: unforeseen", worker.who)
                error = WorkerFailed(f"{worker.who}: {type(unforeseen).__name__}: {unforeseen}")
            self._on_change()
            delay = window.failed(worker.served)
            if delay is None:
                self._give_up(worker, error)
                return
            logger.info("%s: restart in %g s", worker.who, delay)
            await asyncio.sleep(delay)

    def _give_up(self, worker: Worker, error: WorkerFailed) -> None:
        self._given_up[worker] = error
        worker.give_up()
        logger.error("%s: given up: %s", worker.who, error)
        if self.unhealthy is not None:
            self._dispatcher.refuse(ModelUnhealthy(f'Model "{self._spec.name}" is unhealthy: {error}'))
        self._on_change()
