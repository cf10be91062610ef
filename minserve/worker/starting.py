"""Those who wait until the workers of a model are READY."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minserve.errors import MinServeError, WorkerFailed
    from minserve.worker.crew import Crew
    from minserve.worker.keeper import Keeper


class Starting:
    """Tells them when enough workers are READY, or that one has failed.

    A worker that fails is started again all the same, so what it is now does not tell whether it has failed before: its
    last error does, unless that was there already when the number of workers changed last.
    """

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._fewest = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self._old_errors: dict[Keeper, WorkerFailed | None] = {}

    def expect(self, fewest: int) -> None:
        """So many workers are to be READY. Called before those that are missing are started."""
        self._fewest = fewest
        self._old_errors = {keeper: keeper.worker.last_error for keeper in self._crew.in_charge}

    async def wait(self) -> None:
        """Waits for that.

        Raises:
            WorkerFailed: of a worker that is not READY and has failed since `expect`.
            MinServeError: what `end` says.
        """
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            self.look()
            await waiter
        finally:
            self._waiting.discard(waiter)

    def look(self) -> None:
        """A worker's state has changed."""
        if not self._waiting:
            return
        serving = sum(keeper.worker.serving for keeper in self._crew.in_charge)
        errors = (
            keeper.worker.last_error
            for keeper in self._crew.in_charge
            if not keeper.worker.serving and keeper.worker.last_error is not self._old_errors.get(keeper)
        )
        error = next(errors, None)
        if error is not None:
            self.end(error)
        elif serving >= self._fewest:
            for waiter in self._pending():
                waiter.set_result(None)

    def end(self, error: MinServeError) -> None:
        """Nobody needs to wait any longer: `error` says why."""
        for waiter in self._pending():
            waiter.set_exception(error.with_traceback(None))

    def _pending(self) -> list[asyncio.Future[None]]:
        return [waiter for waiter in self._waiting if not waiter.done()]
