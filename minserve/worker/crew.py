"""The workers of a model version that are there just now, each in charge, on trial or leaving."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING

from minserve.worker.devices import NoDevicesError
from minserve.worker.keeper import Keeper
from minserve.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from minserve.dispatch.dispatcher import Dispatcher
    from minserve.errors import WorkerFailed
    from minserve.telemetry.events import EventLog
    from minserve.worker.devices import DeviceAllocator
    from minserve.worker.reports import WorkerReport
    from minserve.worker.spec import ModelSpec
    from minserve.worker.starter import Starter

logger = logging.getLogger(__name__)


class Crew:
    """The workers of one model version.

    One in charge is kept running. One on trial is started once and takes no batches yet: serving goes on as it was until it
    is READY, and if it fails nothing has happened. One that leaves takes no more batches, and ends when it has none left.

    Args:
        on_given_up: called when a worker in charge will not be restarted any more.
        on_change: called when a worker's state has changed.

    Attributes:
        in_charge, on_trial: whoever is; `leaving` with the task that ends it.
    """

    def __init__(
        self,
        directory: Path,
        dispatcher: Dispatcher,
        devices: DeviceAllocator,
        starter: Starter,
        events: EventLog,
        on_given_up: Callable[[Keeper, WorkerFailed], None],
        on_change: Callable[[], None],
    ) -> None:
        self._directory = directory
        self._dispatcher = dispatcher
        self._devices = devices
        self._starter = starter
        self._events = events
        self._on_given_up = on_given_up
        self._on_change = on_change
        self.in_charge: list[Keeper] = []
        self.on_trial: list[Keeper] = []
        self.leaving: dict[Keeper, asyncio.Task[None]] = {}

    # ── they come ──

    def begin(self, spec: ModelSpec, count: int) -> None:
        """Puts workers in charge that have yet to be started, for as long as that takes."""
        for keeper in self.recruit(spec, count):
            self.on_trial.remove(keeper)
            self.in_charge.append(keeper)
            keeper.begin()

    def recruit(self, spec: ModelSpec, count: int) -> list[Keeper]:
        """Workers to be tried: each with the lowest number that is free, and endpoints that are."""
        keepers = []
        for _ in range(count):
            others = [keeper.worker for keeper in self._all()]
            number = next(
                number
                for number in itertools.count()
                if all(number != other.number for other in others)
                and not any(_overlap(number, spec.world_size, other.addresses) for other in others)
            )
            worker = Worker(
                *(spec, number, self._directory, self._dispatcher, self._devices, self._starter, self._events)
            )
            keeper = Keeper(worker, spec, self._events, self._on_change, self._on_given_up)
            worker.comeback = lambda served, keeper=keeper: self._comeback(keeper, served)  # type: ignore[misc]
            self.on_trial.append(keeper)
            keepers.append(keeper)
        return keepers

    def reserve(self, keepers: Sequence[Keeper]) -> bool:
        """Takes the devices of all of them. Where there are too few, none of them is on trial any more."""
        try:
            for keeper in keepers:
                keeper.worker.reserve()
        except NoDevicesError:
            for keeper in keepers:
                keeper.worker.release()
                self.on_trial.remove(keeper)
            return False
        return True

    async def start(self, keepers: Sequence[Keeper]) -> None:
        """Starts workers on trial. All are READY then.

        Raises:
            WorkerFailed: one could not be started, or did not live until the last was. All of them leave.
        """
        try:
            starts = [keeper.try_start() for keeper in keepers]
            done, _ = await asyncio.wait(starts, return_when=asyncio.FIRST_EXCEPTION)
            for start in done:
                start.result()
            for keeper in keepers:
                if not keeper.worker.serving:
                    raise await keeper.worker.failed()
        except BaseException:
            for keeper in keepers:
                self.let_go(keeper, 0.0)
            raise

    def take_over(self, keepers: Sequence[Keeper]) -> None:
        """Workers on trial that are READY are in charge from now on."""
        for keeper in keepers:
            self.on_trial.remove(keeper)
            self.in_charge.append(keeper)
            keeper.take_over()

    # ── they go ──

    def let_go(self, keeper: Keeper, drain_timeout: float) -> None:
        """A worker leaves: no more batches from now on; the rest it does by itself."""
        for those in (self.in_charge, self.on_trial):
            if keeper in those:
                those.remove(keeper)
        keeper.dismiss()
        self.leaving[keeper] = asyncio.create_task(_end(keeper, drain_timeout))
        self.leaving[keeper].add_done_callback(lambda _: self._left(keeper))

    async def settled(self) -> None:
        """Waits until those that leave have ended."""
        while self.leaving:
            await asyncio.wait(self.leaving.values())

    async def stop(self, drain_timeout: float) -> None:
        """Ends all of them, and waits for that. Where it is cancelled `kill` does the rest."""
        until = asyncio.get_running_loop().time() + drain_timeout
        await asyncio.gather(*(_end(keeper, drain_timeout) for keeper in [*self.in_charge, *self.on_trial]))
        try:
            async with asyncio.timeout_at(until):  # those that leave already had been promised more
                await self.settled()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """Ends all of them at once."""
        everyone = self._all()
        for task in self.leaving.values():
            task.cancel()
        await asyncio.gather(*(_end(keeper, None) for keeper in everyone))
        await self.settled()

    def _left(self, keeper: Keeper) -> None:
        del self.leaving[keeper]
        self._on_change()

    # ── for the supervisor ──

    @property
    def serving(self) -> bool:
        """Whether one takes batches."""
        return any(keeper.worker.serving for keeper in self.in_charge)

    def report(self) -> list[WorkerReport]:
        """Every worker, by number."""
        return sorted((keeper.worker.report() for keeper in self._all()), key=lambda report: report.number)

    def find(self, number: int) -> Worker | None:
        """The worker in charge that has the number."""
        return next((keeper.worker for keeper in self.in_charge if keeper.worker.number == number), None)

    def _all(self) -> list[Keeper]:
        return [*self.in_charge, *self.on_trial, *self.leaving]

    def _comeback(self, keeper: Keeper, served: bool) -> float | None:
        """When there is a READY worker again once this one has failed; None also where there is another, so at once."""
        others = any(other.worker.serving for other in self.in_charge if other is not keeper)
        return None if others else keeper.comeback(served)


async def _end(keeper: Keeper, drain_timeout: float | None) -> None:
    try:
        await (keeper.kill() if drain_timeout is None else keeper.stop(drain_timeout))
    except Exception:  # the others shall end all the same
        logger.exception("%s: unforeseen", keeper.worker.who)


def _overlap(number: int, world_size: int, addresses: range) -> bool:
    """Whether the endpoints of worker `number` of a spec are among those of a worker of, perhaps, another spec."""
    return number * world_size < addresses.stop and addresses.start < (number + 1) * world_size
