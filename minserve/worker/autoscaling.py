"""Looks at the load of a model and does what the scaler decides: one worker more, or one less."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from minserve.errors import WorkerFailed
from minserve.telemetry.events import EventKind
from minserve.worker.scaling import Scale

if TYPE_CHECKING:
    from collections.abc import Callable

    from minserve.dispatch.dispatcher import Dispatcher
    from minserve.telemetry.events import EventLog
    from minserve.worker.crew import Crew
    from minserve.worker.scaling import Scaler
    from minserve.worker.spec import ModelSpec

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at the load


class Autoscaler:
    """Adds workers to a crew and takes them away. Whoever changes the crew otherwise cancels `task` first.

    Args:
        name: the model's.
        on_added: called when a worker that was added is READY.

    Attributes:
        task: looks at the load; None as long as there was nothing to decide.
    """

    def __init__(
        self, name: str, crew: Crew, dispatcher: Dispatcher, events: EventLog, on_added: Callable[[], object]
    ) -> None:
        self._name = name
        self._crew = crew
        self._dispatcher = dispatcher
        self._events = events
        self._on_added = on_added
        self.task: asyncio.Task[None] | None = None

    def resume(self, spec: ModelSpec, scaler: Scaler) -> None:
        """Looks at the load from now on, unless the number of workers is fixed."""
        if scaler.fewest < scaler.most:
            self.task = asyncio.create_task(self._watch_load(spec, scaler))

    def tell(self, detail: str) -> None:
        """Another number of workers, whoever decided it: to the log and the events."""
        logger.info("%s: %s", self._name, detail)
        self._events.record(EventKind.SCALED, detail)

    async def _watch_load(self, spec: ModelSpec, scaler: Scaler) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._look(spec, scaler)
            except Exception:
                logger.exception("%s: unforeseen", self._name)

    async def _look(self, spec: ModelSpec, scaler: Scaler) -> None:
        keepers = [keeper for keeper in self._crew.in_charge if keeper.given_up is None]
        idle = [keeper.idle() for keeper in keepers]
        settled = not self._crew.leaving and all(keeper.worker.serving for keeper in keepers)
        decision = scaler.look(idle, settled=settled, oldest_wait=self._dispatcher.oldest_wait)
        if decision is Scale.UP:
            await self._add(spec, scaler, len(keepers))
        elif decision is Scale.DOWN:
            longest = max(idle)
            keeper = keepers[idle.index(longest)]
            self._crew.let_go(keeper, spec.longest_drain)
            self.tell(f"{len(keepers)} → {len(keepers) - 1} workers: {keeper.worker.who} idle for {longest:.0f} s")

    async def _add(self, spec: ModelSpec, scaler: Scaler, workers: int) -> None:
        waited = self._dispatcher.oldest_wait
        added = self._crew.recruit(spec, 1)
        try:
            await self._crew.start(added)
        except WorkerFailed as error:
            self.tell(f"still {workers} workers: {error}; next try in {scaler.failed():g} s")
            return
        scaler.succeeded()
        self._crew.take_over(added)
        self._on_added()
        self.tell(f"{workers} → {workers + 1} workers: a request had waited for {waited:.1f} s")
