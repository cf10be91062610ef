"""A worker: one place in a model's set of rank groups, and the state machine that fills it, again and again.

STARTING → CONNECTING → LOADING → READY ⇄ BUSY → DRAINING → STOPPED
    ↑          └───────────┴────────┴───────┴────────┴──→ FAILED ─┐
    └──────────────────────── back-off ───────────────────────────┘
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minserve.errors import WorkerFailed
from minserve.worker.devices import NoDevicesError
from minserve.worker.group import RankGroup

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from minserve.dispatch.dispatcher import Dispatcher
    from minserve.dispatch.request import Request
    from minserve.worker.devices import DeviceAllocator, Devices
    from minserve.worker.spec import ModelSpec

logger = logging.getLogger(__name__)


class State(enum.StrEnum):
    """Where a worker is in its life."""

    STARTING = "STARTING"
    CONNECTING = "CONNECTING"
    LOADING = "LOADING"
    READY = "READY"
    BUSY = "BUSY"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"


_ENDS = frozenset({State.FAILED, State.STOPPED})
_NEXT: Mapping[State, frozenset[State]] = {
    State.STARTING: frozenset({State.CONNECTING}) | _ENDS,
    State.CONNECTING: frozenset({State.LOADING}) | _ENDS,
    State.LOADING: frozenset({State.READY}) | _ENDS,
    State.READY: frozenset({State.DRAINING}) | _ENDS,
    State.DRAINING: _ENDS,
    State.FAILED: frozenset({State.STARTING, State.STOPPED}),
    State.STOPPED: frozenset({State.STARTING}),
}


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank as operators see it."""

    rank: int
    pid: int
    endpoint: str
    progress: str


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker as operators see it. Times are seconds since the epoch."""

    number: int
    state: State
    started_at: float
    restarts: int
    devices: str | None
    agent_pid: int
    ranks: tuple[RankReport, ...]
    last_error: str
    last_error_at: float
    last_lines: tuple[str, ...]

    @property
    def serving(self) -> bool:
        """Whether it takes batches."""
        return self.state in (State.READY, State.BUSY)


class Worker:
    """Keeps at most one rank group alive. `start` brings it to READY, `failed` tells its end, `stop` ends it.

    Args:
        number: lowest free number in its model version; fixes its endpoints.
        directory: the model version's runtime directory.
        dispatcher: where the requests come from.

    Attributes:
        who: "model/number" for messages.
    """

    def __init__(
        self,
        spec: ModelSpec,
        number: int,
        directory: Path,
        dispatcher: Dispatcher,
        devices: DeviceAllocator,
        environ: Mapping[str, str],
    ) -> None:
        self._spec = spec
        self._number = number
        self._directory = directory
        self._dispatcher = dispatcher
        self._allocator = devices
        self._environ = environ
        self.who = f"{spec.name}/{number}"
        self._state = State.STOPPED
        self._group: RankGroup | None = None
        self._devices: Devices | None = None
        self._started_at = 0.0
        self._starts = 0
        self._last_error: WorkerFailed | None = None
        self._last_error_at = 0.0
        self._served = False
        self._drained = asyncio.Event()

    @property
    def state(self) -> State:
        """READY or BUSY, whichever it is just now, or any other state."""
        if self._state is State.READY and self._group is not None and self._group.busy:
            return State.BUSY
        return self._state

    # ── its life, in order ──

    async def start(self) -> None:
        """From STARTING to READY.

        Raises:
            WorkerFailed: with the culprit. The worker is FAILED then and nothing of it runs any more.
        """
        self._enter(State.STARTING)
        self._starts += 1
        self._started_at = time.time()
        options = self._spec.config.minserve
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            self._devices = self._allocator.reserve(self.who, self._spec.config, self._spec.world_size)
            self._group = RankGroup(
                *(self._spec, self.who, self._number, self._directory, self._devices, self._environ), self._on_free
            )
            self._group.launch()
            self._enter(State.CONNECTING)
            await self._group.connect(min(options.accept_timeout, self._spec.startup_timeout))
            self._enter(State.LOADING)
            await self._group.load(max(0.0, began + self._spec.startup_timeout - loop.time()))
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
            self._release()
            self._enter(State.STOPPED)
            raise
        self._enter(State.READY)
        logger.info("%s: ready after %.1f s", self.who, loop.time() - began)
        self._dispatcher.attach(self)

    async def failed(self) -> WorkerFailed:
        """Waits until a READY worker fails, and cleans up after it."""
        assert self._group is not None
        error = await asyncio.shield(self._group.failed)
        await self._fail(error)
        return error

    def give_up(self) -> None:
        """FAILED for good: another worker may have the devices."""
        self._release()

    async def stop(self, drain_timeout: float) -> None:
        """Lets what is in flight finish, then ends the group. In any state; STOPPED afterwards."""
        self._dispatcher.detach(self)
        if self._state is State.STOPPED:
            return
        if self._state is State.READY and self._group is not None:
            self._enter(State.DRAINING)
            await self._drain(self._group, drain_timeout)
            await self._group.end(self._spec.config.minserve.exit_timeout)
        await self._end_group()
        self._release()
        self._enter(State.STOPPED)

    @property
    def served(self) -> bool:
        """Whether the rank group that failed last had carried a batch through."""
        return self._served

    # ── a lane of the dispatcher ──

    def has_place(self) -> bool:
        """Whether a batch may be sent now."""
        return self._state is State.READY and self._group is not None and self._group.has_place()

    def send(self, requests: list[Request]) -> None:
        """Sends a batch to all ranks."""
        assert self._group is not None
        self._group.send(requests)

    # ── for operators ──

    def report(self) -> WorkerReport:
        """What it is doing, for `/models/{model}` and `minserve status`."""
        group, error = self._group, self._last_error
        addresses = group.endpoints.addresses if group is not None and group.endpoints is not None else []
        return WorkerReport(
            number=self._number,
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
        )

    # ── inside ──

    def _enter(self, state: State) -> None:
        if state not in _NEXT[self._state]:
            raise AssertionError(f"{self.who}: no way from {self._state} to {state}")
        logger.debug("%s: %s → %s", self.who, self._state, state)
        self._state = state

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
        await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()

    async def _fail(self, error: WorkerFailed) -> None:
        self._dispatcher.detach(self)
        self._served = self._group is not None and self._group.served
        self._last_error, self._last_error_at = error, time.time()
        logger.error("%s%s", error, "".join(f"\n    {line}" for line in error.last_lines))
        self._enter(State.FAILED)  # before the kill: nobody shall take it for READY meanwhile
        await self._end_group()

    async def _end_group(self) -> None:
        if self._group is not None:
            await asyncio.shield(self._group.kill())
            self._group = None

    def _release(self) -> None:
        """Gives the devices back. Not between restarts: a single-process worker might sit down on one meanwhile."""
        self._allocator.release(self.who)
        self._devices = None
