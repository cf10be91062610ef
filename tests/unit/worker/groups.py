"""Rank groups without ranks, for the tests of workers and supervisors."""

import asyncio
import math
from pathlib import Path
from typing import ClassVar

import pytest

from minserve.dispatch.dispatcher import Dispatcher
from minserve.dispatch.request import Reply, Request
from minserve.errors import WorkerFailed
from minserve.telemetry.events import EventKind, EventLog
from minserve.wire.messages import Answer, RequestMeta
from minserve.worker.blame import Cause, What
from minserve.worker.devices import DeviceAllocator, Devices, Inventory
from minserve.worker.endpoints import Endpoints
from minserve.worker.spec import ModelSpec
from minserve.worker.starter import Starter
from minserve.worker.supervisor import Supervisor
from minserve.worker.worker import Worker
from tests.unit.worker.specs import make_spec, model_config


class FakeGroup:
    """Stands in for a RankGroup: does nothing but tell what was asked of it, and fail as it is told."""

    made: ClassVar[list["FakeGroup"]] = []
    failing: ClassVar[dict[str, Exception]] = {}  # step → what it raises
    hanging: ClassVar[set[str]] = set()
    load_seconds: ClassVar[float] = 0.0
    slow: ClassVar[dict[str, float]] = {}  # the same for one worker
    causes: ClassVar[dict[str, Cause]] = {}  # by worker: what its group says of its end
    loads: ClassVar[list[Exception | None]] = []  # what the next loads raise, one after the other; then none does

    def __init__(
        self,
        spec: ModelSpec,
        who: str,
        slot: int,
        directory: Path,
        devices: Devices,
        starter: Starter,
        on_free: object,
        *more: object,
    ) -> None:
        self.spec = spec
        self.who = who
        self.slot = slot
        self.devices = devices
        self.on_free = on_free
        self.calls: list[str] = []
        self.batches: list[list[Request]] = []
        self.failed: asyncio.Future[WorkerFailed] = asyncio.get_running_loop().create_future()
        self.cause = FakeGroup.causes.get(who)
        self.suspected = False
        self.served = False
        self.batch_seconds: float | None = None
        self.answers_held = 0
        self.agent_pid = 4711
        self.pids = {0: 4712}
        self.endpoints = Endpoints(f"unix:{directory}/worker.", slot * spec.world_size, spec.world_size)
        FakeGroup.made.append(self)

    @classmethod
    def living(cls) -> list["FakeGroup"]:
        """Those whose processes run."""
        return [group for group in cls.made if "launch" in group.calls and "kill" not in group.calls]

    async def _step(self, name: str) -> None:
        self.calls.append(name)
        if name in self.hanging:
            await asyncio.Event().wait()
        if name in self.failing:
            raise self.failing[name]

    async def launch(self) -> None:
        self.calls.append("launch")
        if "launch" in self.failing:
            raise self.failing["launch"]

    async def connect(self, timeout: float) -> None:
        self.accept_timeout = timeout
        await self._step("connect")

    async def load(self, timeout: float) -> None:
        self.load_timeout = timeout
        seconds = self.slow.get(self.who, self.load_seconds)
        if seconds:
            await asyncio.sleep(seconds)
        await self._step("load")
        outcome = self.loads.pop(0) if self.loads else None
        if outcome is not None:
            raise outcome

    @property
    def under_way(self) -> int:
        return len(self.batches)

    def has_place(self, *, full: bool = True, ahead: int = 0) -> bool:
        return not self.busy and not self.failed.done()

    def send(self, requests: list[Request]) -> None:
        self.batches.append(requests)

    @property
    def busy(self) -> bool:
        return bool(self.batches)

    def finish(self) -> None:
        """The batch is done."""
        for request in self.batches.pop():
            request.answer(Answer(0, 2), b"ok")
        self.served = True
        assert callable(self.on_free)
        self.on_free()

    def fail(self, error: WorkerFailed) -> None:
        """A rank dies: the group is lost, and what is in flight is answered, in this order."""
        self.cause = Cause(What.DEATH, 1, 4713, "was killed by SIGKILL", 0.0, -9)
        self.failed.set_result(error)
        self._answer(error)

    async def end(self, exit_timeout: float) -> None:
        self.exit_timeout = exit_timeout
        await self._step("end")
        await self.kill()

    async def kill(self) -> None:
        self._answer(WorkerFailed(f"{self.who}: the worker was stopped"))
        await self._step("kill")

    def _answer(self, error: WorkerFailed) -> None:
        batches, self.batches = self.batches, []
        for batch in batches:
            for request in batch:
                request.fail(error)

    def stage(self, rank: int) -> str:
        return f"weights of {rank}"


def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on workers have fake groups, and no file is looked at."""
    monkeypatch.setattr("minserve.worker.worker.RankGroup", FakeGroup)
    monkeypatch.setattr("minserve.worker.keeper.read_fingerprint", Files.read_fingerprint)
    fresh: dict[str, object] = {
        "made": [],
        "failing": {},
        "hanging": set(),
        "load_seconds": 0.0,
        "slow": {},
        "loads": [],
        "causes": {},
    }
    for name, value in fresh.items():
        monkeypatch.setattr(FakeGroup, name, value)
    monkeypatch.setattr(Files, "state", "as they were")


class Files:
    """The files of every model directory."""

    state: ClassVar[str] = ""

    @classmethod
    async def read_fingerprint(cls, directory: Path) -> str:
        return cls.state


def crew_spec(ranks: int = 1, torchrun: dict[str, object] | None = None, **keys: object) -> ModelSpec:
    """A model that is restarted at once and for long, unless `keys` say otherwise; those of `minserve:` among them."""
    own = {
        "backoff": (0.0,),
        "stable_period": 60.0,
        "drain_timeout": 30.0,
        "scale_up_wait": 2.0,
        "scale_down_idle": 10.0,
    }
    minserve = {name: keys.pop(name, value) for name, value in own.items()}
    keys = {"max_batch_delay": 0, "max_retry_timeout_in_sec": 300.0, **keys}
    return make_spec(ranks, config=model_config("tp" if ranks > 1 else "", minserve, torchrun, **keys))


class House:
    """A supervisor with its dispatcher, devices and events, over fake groups."""

    def __init__(
        self, spec: ModelSpec | None = None, count: int = 1, devices: int = 0, allocator: DeviceAllocator | None = None
    ) -> None:
        self.spec = spec or crew_spec()
        self.dispatcher = Dispatcher(asyncio.get_running_loop(), "m", self.spec.config.batch_size, 0.0, 100)
        self.allocator = allocator or DeviceAllocator(Inventory(tuple(map(str, range(devices)))))
        self.events = EventLog("m")
        self.changes = 0
        self.supervisor = Supervisor(
            *(self.spec, count, Path("/run/m1"), self.dispatcher, self.allocator, no_starter(), self.events),
            self._changed,
        )

    def _changed(self) -> None:
        self.changes += 1

    def submit(self, deadline: float = math.inf) -> asyncio.Task[Reply]:
        """A client that waits for its answer."""
        loop = asyncio.get_running_loop()
        return asyncio.create_task(
            self.dispatcher.submit(Request(RequestMeta("", (), ()), [], deadline, loop.create_future()))
        )

    @property
    def states(self) -> str:
        """The states of all workers, with their numbers."""
        return " ".join(f"{report.number}:{report.state}" for report in self.supervisor.report())

    @property
    def lanes(self) -> list[Worker]:
        """The workers that take batches."""
        return [lane for lane in self.dispatcher._lanes._lanes if isinstance(lane, Worker)]

    def not_ready(self) -> str | None:
        return self.supervisor.not_ready

    def unhealthy(self) -> str | None:
        return None if self.supervisor.unhealthy is None else str(self.supervisor.unhealthy)

    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.events.latest()]

    def details(self, kind: EventKind) -> list[str]:
        return [event.detail for event in self.events.latest() if event.kind is kind]


def no_starter() -> Starter:
    """For groups without processes."""
    return Starter({}, Path("/run"))


async def settle() -> None:
    """Lets everything happen that can happen now, without time going on."""
    for _ in range(50):
        await asyncio.sleep(0)


async def started(house: House) -> House:
    """Once its workers are READY."""
    house.supervisor.start()
    await settle()
    return house


async def answered(client: asyncio.Task[Reply]) -> bytes:
    """Finishes batches until this client has its answer."""
    async with asyncio.timeout(1000):
        while not client.done():
            for group in FakeGroup.living():
                if group.busy:
                    group.finish()
            await asyncio.sleep(0.1)
    return bytes((await client).body)


def elastic(**keys: object) -> ModelSpec:
    """A model of one to three workers."""
    return crew_spec(**{"min_workers": 1, "max_workers": 3, **keys})  # type: ignore[arg-type]
