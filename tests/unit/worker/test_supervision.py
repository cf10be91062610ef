"""Supervisor, workers and dispatcher together under whatever may happen in whatever order, in fake time."""

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Coroutine
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minserve.dispatch.request import Reply
from minserve.errors import Draining, MinServeError, ModelUnhealthy, NoWorkers, WorkerFailed
from minserve.worker.spec import ModelSpec
from minserve.worker.states import State
from tests.fakes import FakeTimeLoop
from tests.unit.worker.groups import FakeGroup, Files, House, crew_spec, no_ranks, settle

T = TypeVar("T")

DEVICES = 4
MOST = 2
DRAIN_TIMEOUT = 5.0

LOADS: dict[str, Exception | None] = {
    "well": None,
    "no connection": WorkerFailed("rank 1 did not connect"),
    "a typo": WorkerFailed("cannot load: a typo", load_error="a typo"),
    "no weights": WorkerFailed("cannot load: no weights", load_error="no weights"),
}


def spec(ranks: int = 2, most: int = MOST, fixed: bool = False, batch_size: int = 1) -> ModelSpec:
    return crew_spec(
        ranks,
        {"rdzv_endpoint": "localhost:29400"} if fixed and ranks > 1 else None,
        **{"backoff": (0.0, 1.0, 2.0, 5.0), "drain_timeout": DRAIN_TIMEOUT, "max_retry_timeout_in_sec": 40.0},
        **{"min_workers": 1, "max_workers": most, "batch_size": batch_size},
    )


SPECS = st.builds(spec, st.sampled_from([1, 2, 3]), st.integers(1, MOST), st.booleans(), st.integers(1, 3))


class Supervision(RuleBasedStateMachine):
    """Rules are what clients, ranks, disks, operators and the clock do; invariants are what they may rely on."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        no_ranks(self.patch)
        FakeGroup.load_seconds = 1.0
        self.loop = FakeTimeLoop()
        self.clients: dict[asyncio.Task[Reply], float] = {}
        self.replacing: asyncio.Task[None] | None = None
        self.stopped = False

        async def open_house() -> House:
            house = House(spec(), devices=DEVICES)
            house.supervisor.start()
            await settle()
            return house

        self.house = self.run(open_house())

    def run(self, work: Coroutine[object, object, T]) -> T:
        return self.loop.run_until_complete(work)

    def soon(self, do: Callable[[], T]) -> T:
        """Does something on the loop, and lets happen what follows at once."""

        async def then_settle() -> T:
            result = do()
            await settle()
            return result

        return self.run(then_settle())

    # ── clients ──

    @rule(patience=st.floats(0.5, 60.0))
    def submit(self, patience: float) -> None:
        deadline = self.loop.time() + patience
        client = self.soon(lambda: self.house.submit(deadline))
        self.clients[client] = deadline

    @rule()
    def rush(self) -> None:
        """More requests than one worker has places for, for long enough that another one is added."""
        for _ in range(4):
            self.submit(60.0)
        self.wait(4.0)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(list(self.clients)))
        self.soon(client.cancel)

    # ── ranks ──

    @rule(load=st.sampled_from(sorted(LOADS)), times=st.integers(1, 4))
    def next_loads(self, load: str, times: int) -> None:
        FakeGroup.loads += [LOADS[load]] * times

    @rule()
    def finish(self) -> None:
        for group in FakeGroup.living():
            if group.busy and not group.failed.done():
                self.soon(group.finish)

    @precondition(lambda self: self.loaded())
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(self.loaded()))
        self.soon(lambda: group.fail(WorkerFailed(f"{group.who}: rank 0 died")))

    @rule(load=st.sampled_from(sorted(LOADS)))
    def crash(self, load: str) -> None:
        """Every rank dies, and the next starts end alike."""
        FakeGroup.loads = [LOADS[load]] * 3
        for group in self.loaded():
            self.soon(functools.partial(group.fail, WorkerFailed(f"{group.who}: rank 0 died")))
        self.wait(10.0)

    def loaded(self) -> list[FakeGroup]:
        return [group for group in FakeGroup.living() if "load" in group.calls and not group.failed.done()]

    # ── the clock and the disk ──

    @rule(seconds=st.sampled_from([0.05, 0.5, 1.0, 3.0, 10.0, 70.0]))
    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))
        self.soon(lambda: None)

    @rule()
    def edit(self) -> None:
        Files.state += "."

    # ── operators ──

    @precondition(lambda self: not self.stopped and (self.replacing is None or self.replacing.done()))
    @rule(new=SPECS)
    def reload(self, new: ModelSpec) -> None:
        self.collect()

        async def replace() -> None:
            await self.house.supervisor.replace(new, 1)
            self.house.spec = new

        self.replacing = self.soon(lambda: self.loop.create_task(replace()))

    @precondition(lambda self: not self.stopped and (self.replacing is None or self.replacing.done()))
    @rule(fewest=st.integers(0, MOST), more=st.integers(0, MOST))
    def resize(self, fewest: int, more: int) -> None:
        self.collect()
        most = min(MOST, fewest + more) if fewest else 0
        self.soon(lambda: self.loop.create_task(self.house.supervisor.resize(fewest, most))).result()
        config = self.house.spec.config.model_copy(update={"min_workers": fewest, "max_workers": most})
        self.house.spec = dataclasses.replace(self.house.spec, config=config)

    @precondition(lambda self: not self.stopped)
    @rule(hurry=st.none() | st.floats(0.0, 2.0))
    def stop(self, hurry: float | None) -> None:
        self.stopped = True

        async def end() -> None:
            began = self.loop.time()
            stop = asyncio.create_task(self.house.supervisor.stop(DRAIN_TIMEOUT))
            await asyncio.wait([stop], timeout=hurry)
            if not stop.done():
                stop.cancel()
                await asyncio.wait([stop])
            assert self.loop.time() - began <= (DRAIN_TIMEOUT if hurry is None else hurry) + 0.01
            await settle()
            if not stop.cancelled():
                stop.result()

        self.run(end())
        self.collect()
        assert {report.state for report in self.house.supervisor.report()} <= {State.STOPPED}
        assert FakeGroup.living() == []
        assert self.house.lanes == []
        assert not self.house.allocator._owned
        assert not self.house.allocator._shared
        assert all(client.done() for client in self.clients)
        assert asyncio.all_tasks(self.loop) == set()

    def collect(self) -> None:
        """A reload ends well, or says why it did not."""
        if self.replacing is not None and self.replacing.done():
            error = self.replacing.exception()
            assert error is None or isinstance(error, WorkerFailed | Draining), error
            self.replacing = None

    # ── what holds at all times ──

    @invariant()
    def every_request_is_answered_by_its_deadline(self) -> None:
        for client, deadline in self.clients.items():
            if not client.done():
                assert self.loop.time() <= deadline
            elif not client.cancelled():
                error = client.exception()
                assert isinstance(error, MinServeError) if error else client.result().body == b"ok"

    @invariant()
    def no_two_groups_share_a_place(self) -> None:
        places = [address for group in FakeGroup.living() for address in group.endpoints.addresses]
        assert len(places) == len(set(places))
        names = [group.who for group in FakeGroup.living()]
        assert len(names) == len(set(names))

    @invariant()
    def no_more_groups_than_allowed(self) -> None:
        crew = self.house.supervisor._crew
        assert len(crew.in_charge) <= MOST
        assert len(FakeGroup.living()) <= len(self.house.supervisor.report())
        if self.replacing is None or self.replacing.done():
            if not crew.leaving:
                assert len(FakeGroup.living()) <= self.house.spec.config.max_workers_or(1)
        elif not self.stopped:
            assert len(FakeGroup.living()) <= 2 * MOST

    @invariant()
    def devices_belong_to_one_worker_each_and_to_one_that_is_there(self) -> None:
        account = self.house.allocator
        owned = [index for ids in account._owned.values() for index in ids]
        assert len(owned) == len(set(owned))
        assert set(owned) | set(account._shared.values()) <= set(range(DEVICES))
        crew = self.house.supervisor._crew
        given_up = {keeper.worker.number for keeper in crew.in_charge if keeper.given_up is not None}
        there = {f"m/{report.number}" for report in self.house.supervisor.report() if report.number not in given_up}
        assert account._owned.keys() | account._shared.keys() <= there

    @invariant()
    def the_workers_that_get_batches_are_those_in_charge_that_are_ready(self) -> None:
        ready = [keeper.worker for keeper in self.house.supervisor._crew.in_charge if keeper.worker.serving]
        assert set(ready) == set(self.house.lanes)
        assert len(self.house.lanes) == len(ready)
        assert (self.house.not_ready() is None) == (bool(ready) or self.nobody_wanted())

    def nobody_wanted(self) -> bool:
        return self.house.supervisor._scaler.fewest == 0 and not self.stopped

    @invariant()
    def a_model_that_is_given_up_refuses_and_no_other_does(self) -> None:
        refusal = self.house.dispatcher._refusal
        if self.stopped:
            assert isinstance(refusal, Draining)
        elif self.house.unhealthy() is not None:
            assert isinstance(refusal, ModelUnhealthy)
            assert self.house.dispatcher.queued == 0
        elif self.nobody_wanted():
            assert isinstance(refusal, NoWorkers)
            assert self.house.dispatcher.queued == 0
        else:
            assert refusal is None

    # ── and in the end ──

    def teardown(self) -> None:
        """Once nothing goes wrong any more, everything is well again; then all of it can be stopped."""
        try:
            if not self.stopped:
                FakeGroup.loads.clear()
                self.recover()
                self.stop(None)
        finally:
            for client in self.clients:
                if client.done() and not client.cancelled():
                    client.exception()  # was looked at
            self.collect()
            self.loop.close()
            self.patch.undo()

    def recover(self) -> None:
        async def ranks_work() -> None:
            while True:
                for group in FakeGroup.living():
                    if group.busy and not group.failed.done():
                        group.finish()
                await asyncio.sleep(0.5)

        async def be_well() -> None:
            work = asyncio.create_task(ranks_work())
            await asyncio.sleep(100)
            if self.house.supervisor._scaler.fewest != 1:
                await self.house.supervisor.resize(1, MOST)
                await asyncio.sleep(100)
            if self.house.unhealthy() is not None:
                await self.house.supervisor.replace(dataclasses.replace(self.house.spec), 1)
            assert self.house.not_ready() is None
            assert (await self.house.submit(self.loop.time() + 10)).body == b"ok"
            await asyncio.sleep(100)
            assert len(FakeGroup.living()) == 1, "minWorkers"
            work.cancel()

        self.run(be_well())


TestSupervision = Supervision.TestCase
TestSupervision.settings = settings(max_examples=150, stateful_step_count=30)
