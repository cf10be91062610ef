"""One model version that is served."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

from minserve.registry.reading import remove

if TYPE_CHECKING:
    from pathlib import Path

    from minserve.dispatch.dispatcher import Dispatcher
    from minserve.errors import MinServeError
    from minserve.registry.source import Source
    from minserve.registry.validating import ValidModel
    from minserve.telemetry.events import EventLog
    from minserve.worker.spec import ModelSpec
    from minserve.worker.supervisor import Supervisor


class ServedModel:
    """One model version: its queue, its workers, and what has happened to them.

    Attributes:
        spec, workers: what is served just now, and the fewest workers; a reload and `resize` change both.
        directory: of its sockets and log pipes.
        source: where it was read from, and is read again on a reload.
        is_default: it answers requests that name no version.
        gone: it is unregistered, and takes no requests any more.
        loaded_at_startup: it was there when the server started, nobody has registered it since.
        extracted: the folder of its files if they come from an archive.
    """

    def __init__(
        self,
        model: ValidModel,
        directory: Path,
        dispatcher: Dispatcher,
        supervisor: Supervisor,
        events: EventLog,
        loaded_at_startup: bool = True,
    ) -> None:
        self.spec: ModelSpec = model.spec
        self.workers = model.workers
        self.source: Source = model.source
        self.directory = directory
        self.dispatcher = dispatcher
        self.supervisor = supervisor
        self.events = events
        self.is_default = self.gone = False
        self.loaded_at_startup = loaded_at_startup
        self.extracted = model.extracted
        self._scaled: tuple[int, int] | None = None

    @property
    def stream_stall_timeout(self) -> float:
        """Seconds for which a stream's client may take no byte."""
        return self.spec.config.minserve.stream_stall_timeout

    async def wait_started(self, timeout: float | None = None) -> bool:
        """Waits until the fewest workers are READY, or `timeout` seconds. Returns whether they are.

        Raises:
            WorkerFailed: of the first worker that fails meanwhile.
            Draining: the server is stopping, or the model is being unregistered.
        """
        try:
            async with asyncio.timeout(timeout):
                await self.supervisor.started()
        except TimeoutError:
            return False
        return True

    async def resize(self, fewest: int, most: int) -> None:
        """Runs between `fewest` and `most` workers from now on, see `Supervisor.resize`. A reload keeps to that."""
        await self.supervisor.resize(fewest, most)
        self._scaled = fewest, most
        self.spec, self.workers = _sized(self.spec, fewest, most), fewest

    async def replace(self, model: ValidModel) -> None:
        """Puts workers of the model as it has been read anew in the place of those there are, see `Supervisor.replace`."""
        spec, workers = model.spec, model.workers
        if self._scaled is not None:
            spec, workers = _sized(spec, *self._scaled), self._scaled[0]
        await self.supervisor.replace(spec, workers)
        before, self.extracted = self.extracted, model.extracted
        self.spec, self.workers = spec, workers
        await self.supervisor.settled()
        if before != self.extracted:
            await remove(before)

    async def end(self, refusal: MinServeError, timeout: float, drain_timeout: float) -> bool:
        """Answers all requests, those that wait too, then ends the workers and removes what was extracted.

        Returns whether that took less than `timeout` seconds; if not everything was killed.

        Args:
            refusal: what a request gets that comes too late.
            drain_timeout: seconds for the requests that are there.
        """
        in_time = True
        try:
            async with asyncio.timeout(timeout):
                await self._answered(drain_timeout)
                await self.supervisor.stop(drain_timeout, refusal)
        except TimeoutError:
            in_time = False
        finally:
            if not in_time:
                await self.supervisor.stop(0.0, refusal)
            await remove(self.extracted)
        return in_time

    async def _answered(self, timeout: float) -> None:
        """Waits for the requests that are there; those of a model that cannot answer are not waited for."""
        if self.supervisor.not_ready is None:
            try:
                async with asyncio.timeout(timeout):
                    await self.dispatcher.answered()
            except TimeoutError:
                return


def _sized(spec: ModelSpec, fewest: int, most: int) -> ModelSpec:
    config = spec.config.model_copy(update={"min_workers": fewest, "max_workers": most})
    return dataclasses.replace(spec, config=config)
