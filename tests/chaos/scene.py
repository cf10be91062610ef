"""What a fault needs of the run: the server, its models' state as operators see it, the background load, the book."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import aiohttp

from tests.chaos.catalogue import FIRST_BATCH_S, GRACE_S, RESPONSE_S, STALL_S, Model
from tests.chaos.client import DEADLINE_S, Client
from tests.chaos.faults import Fault, Limit, Who
from tests.chaos.ledger import Ledger
from tests.chaos.schedule import Injection
from tests.chaos.server import ChaosServer

POLL_S = 0.01
READY_S = 90.0  # for a worker to be READY again: four imports of torch on two cores that others use, too
SERVING = ("READY", "BUSY")
LOAD_CLIENTS = 3  # for each model
PAUSE_S = (0.02, 0.2)  # between two of a client's requests: the two cores of a small machine shall have time for faults
IMPATIENT = 0.2  # share of their requests whose deadline may well pass while a worker starts
IMPATIENT_S = (0.5, 5.0)


@dataclass(frozen=True)
class Facts:
    """The first worker of a model, from /models/{model}."""

    state: str
    restarts: int
    agent: int
    ranks: tuple[int, ...]
    error: str
    error_time: str
    lines: tuple[str, ...]
    workers: int
    pending: int

    @property
    def serving(self) -> bool:
        return self.state in SERVING

    def differ(self, later: Facts) -> bool:
        """Whether something has happened to the worker since."""
        return not later.serving or (later.restarts, later.error_time) != (self.restarts, self.error_time)


class Scene:
    """One server under load, and what is done to it.

    Args:
        tolerance_s: what is later than its limit by more than this is a breach; what is later by less is shown in the table.
    """

    def __init__(
        self, server: ChaosServer, client: Client, ledger: Ledger, rng: random.Random, tolerance_s: float
    ) -> None:
        self.server = server
        self.client = client
        self.ledger = ledger
        self.rng = rng
        self.tolerance_s = tolerance_s
        self._gates = {model.name: asyncio.Event() for model in server.models}
        for gate in self._gates.values():
            gate.set()

    # ── limits ──

    def limit(self, fault: Fault, model: Model) -> float | None:
        """Seconds within which it must be seen. None: it must not be seen at all."""
        return {
            Limit.DEATH: 0.5,
            Limit.AT_ONCE: 0.3,
            Limit.GRACE: GRACE_S + 0.5,
            Limit.STALL: STALL_S + 1.0,  # two looks at the board
            Limit.RESPONSE: RESPONSE_S + 1.0,
            Limit.ACCEPT: model.accept_s + 0.5,
            Limit.STARTUP: model.startup_s + 0.5,
        }.get(fault.limit)

    # ── load ──

    async def load(self, model: Model) -> None:
        """One client of the background load, until it is cancelled."""
        while True:
            await self._gates[model.name].wait()
            fields: dict[str, object] = {}
            if not model.streams and self.rng.random() < 0.2:
                fields["work"] = round(self.rng.uniform(0.005, 0.03), 4)
            impatient = self.rng.random() < IMPATIENT
            await self.client.ask(model, fields, self.rng.uniform(*IMPATIENT_S) if impatient else DEADLINE_S)
            await asyncio.sleep(self.rng.uniform(*PAUSE_S))

    @contextlib.asynccontextmanager
    async def without_load(self, model: Model) -> AsyncIterator[None]:
        """No request but the caller's own is under way meanwhile."""
        gate = self._gates[model.name]
        gate.clear()
        try:
            await self.until(lambda: not self.client.in_flight.get(model.name), READY_S, f"{model.name} idle")
            yield
        finally:
            gate.set()

    # ── state ──

    async def facts(self, model: Model) -> Facts:
        described = await self.client.describe(model)
        workers = described["workers"]
        queue = described.get("jobQueueStatus", {})
        assert isinstance(workers, list)
        assert isinstance(queue, dict)
        worker = workers[0]
        return Facts(
            state=worker["state"],
            restarts=worker["restarts"],
            agent=worker["pid"],
            ranks=tuple(rank["pid"] for rank in worker["ranks"]),
            error=worker.get("lastError", ""),
            error_time=worker.get("lastErrorTime", ""),
            lines=tuple(worker.get("lastLines", ())),
            workers=sum(one["state"] in SERVING for one in workers),
            pending=queue.get("pendingRequests", 0),
        )

    async def watch(self, model: Model, seen: Callable[[Facts], bool], timeout: float) -> Facts | None:
        """Polls until something is to be seen; None when it is not in time."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                facts = await self.facts(model)
                if seen(facts):
                    return facts
            await asyncio.sleep(POLL_S)
        return None

    async def healthy(self, model: Model) -> Facts:
        """READY, with a right answer behind it, so that the limits of a first batch are over."""
        if await self.watch(model, lambda facts: facts.serving, READY_S) is None:
            last = await self.facts(model)
            raise NotReadyError(f"not READY within {READY_S:g} s: {last.state}, {last.error}")
        result = await self.client.ask(model)
        if result.status != 200:
            raise NotReadyError(f"answers {result.status} {result.message!r} though it is READY")
        return await self.facts(model)

    async def until(self, condition: Callable[[], object], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise NotReadyError(f"not within {timeout:g} s: {what}")
            await asyncio.sleep(POLL_S)


class NotReadyError(Exception):
    """The model did not come to the state from which a fault could be done to it."""


def due(fault: Fault, model: Model, rank: int, pid: int) -> re.Pattern[str]:
    """What the messages of a fault must say, `pid` being that of the rank or torchrun to which it happened."""
    who = "torchrun" if fault.who is Who.AGENT else f"rank {rank}"
    return fill(fault.says, model, who, rank, pid)


def fill(says: str, model: Model, who: str, rank: int, pid: int) -> re.Pattern[str]:
    # Field by field, for the patterns have braces of their own.
    text = says.replace("{model}", re.escape(model.name)).replace("{who}", who)
    return re.compile(text.replace("{pid}", str(pid)).replace("{rank}", str(rank)), re.DOTALL)


def longest_wait(injection: Injection) -> float:
    """Seconds after which a fault that has not been seen counts as never seen."""
    slow = {Limit.STARTUP: injection.model.startup_s, Limit.ACCEPT: injection.model.accept_s}
    return max(FIRST_BATCH_S, slow.get(injection.fault.limit, 0.0)) + 20.0
