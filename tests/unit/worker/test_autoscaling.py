"""One worker more or less, as the load asks for it."""

import asyncio
import dataclasses

import pytest

from minserve.errors import WorkerFailed
from minserve.telemetry.events import EventKind
from tests.fakes import in_fake_time
from tests.unit.worker.groups import FakeGroup, House, answered, crew_spec, elastic, no_ranks, settle, started


@pytest.fixture(autouse=True)
def fake_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    no_ranks(monkeypatch)


@in_fake_time
async def test_workers_are_added_while_requests_wait_and_leave_when_they_idle() -> None:
    FakeGroup.load_seconds = 2.0
    house = House(elastic())
    house.supervisor.start()
    await asyncio.sleep(3)
    clients = [house.submit() for _ in range(4)]
    await asyncio.sleep(2)
    assert house.states == "0:BUSY", "nobody has waited for longer than scaleUpWait"
    await asyncio.sleep(2)
    assert house.states == "0:BUSY 1:LOADING"
    await asyncio.sleep(10)
    assert house.states == "0:BUSY 1:BUSY 2:BUSY"
    await asyncio.sleep(10)
    assert len(FakeGroup.living()) == 3, "maxWorkers"
    assert house.dispatcher.queued == 1
    for client in clients:
        assert await answered(client) == b"ok"
    await asyncio.sleep(30)
    assert len(FakeGroup.living()) == 1, "minWorkers"
    details = house.details(EventKind.SCALED)
    assert [detail.partition(":")[0] for detail in details] == [
        *("1 → 2 workers", "2 → 3 workers", "3 → 2 workers", "2 → 1 workers")
    ]
    await asyncio.sleep(100)
    assert len(FakeGroup.living()) == 1
    await house.supervisor.stop(1)


@in_fake_time
async def test_one_that_leaves_finishes_its_batch() -> None:
    house = await started(House(elastic(scale_down_idle=1.0), count=1))
    first, second = house.submit(), house.submit()
    await asyncio.sleep(4)
    assert house.states == "0:BUSY 1:BUSY"
    FakeGroup.made[1].finish()
    assert (await second).body == b"ok"
    await asyncio.sleep(3)
    assert house.states == "0:BUSY", "the idle one has left, not the other"
    assert await answered(first) == b"ok"
    await house.supervisor.stop(1)


@in_fake_time
async def test_while_one_leaves_none_is_added() -> None:
    house = await started(House(elastic(max_workers=2, scale_down_idle=3.0)))
    clients = [house.submit(), house.submit()]
    await asyncio.sleep(4)
    for client in clients:
        assert await answered(client) == b"ok"
    FakeGroup.hanging = {"end"}
    await asyncio.sleep(5)
    assert house.states in ("0:DRAINING 1:READY", "0:READY 1:DRAINING")
    clients = [house.submit(), house.submit()]
    await asyncio.sleep(20)
    assert len(FakeGroup.living()) == 2, "maxWorkers"
    for client in clients:
        assert await answered(client) == b"ok"
    stop = asyncio.create_task(house.supervisor.stop(1))
    await settle()
    stop.cancel()
    await asyncio.wait([stop])
    assert FakeGroup.living() == []


@in_fake_time
async def test_to_wait_for_company_is_no_load() -> None:
    house = await started(House(elastic(max_batch_delay=5000, batch_size=8)))
    house.dispatcher.configure(8, 5.0, 100, 0, adaptive=False)
    client = house.submit()
    await asyncio.sleep(4.9)
    assert house.states == "0:READY"
    assert await answered(client) == b"ok"
    await house.supervisor.stop(1)


@in_fake_time
async def test_a_worker_that_cannot_be_added_is_tried_again_later_and_harms_nobody() -> None:
    spec = dataclasses.replace(elastic(), config=crew_spec(2, min_workers=1, max_workers=2).config, world_size=2)
    house = await started(House(spec, devices=3))
    clients = [house.submit(), house.submit()]
    await asyncio.sleep(60)
    details = house.details(EventKind.SCALED)
    assert 3 <= len(details) <= 4
    assert details[0].startswith(
        "still 1 workers: m/1 needs 2 device(s), 1 of 3 are free; m/0 owns 0, 1; next try in 5 s"
    )
    assert house.states == "0:BUSY"
    assert house.unhealthy() is None
    assert list(house.allocator._owned) == ["m/0"]
    for client in clients:
        assert await answered(client) == b"ok"
    await house.supervisor.stop(1)


@in_fake_time
async def test_an_added_worker_that_does_not_live_is_dropped() -> None:
    house = await started(House(elastic(torchrun={"max_restarts": 0}, max_workers=2)))
    clients = [house.submit(), house.submit()]
    await asyncio.sleep(4)
    assert house.states == "0:BUSY 1:BUSY"
    FakeGroup.made[1].fail(WorkerFailed("m/1: rank 0 died"))
    await settle()
    assert house.states == "0:BUSY"
    assert house.unhealthy() is None
    assert house.details(EventKind.SCALED)[-1] == "m/1 is dropped: m/1: rank 0 died; next try in 5 s"
    assert await answered(clients[0]) == b"ok"
    with pytest.raises(WorkerFailed):
        await clients[1]
    await house.supervisor.stop(1)


@in_fake_time
async def test_a_worker_that_starts_again_is_waited_for() -> None:
    house = await started(House(elastic(backoff=(20.0,))))
    FakeGroup.made[0].fail(WorkerFailed("m/0: rank 0 died"))
    client = house.submit()
    await asyncio.sleep(15)
    assert house.states == "0:FAILED"
    assert await answered(client) == b"ok"
    await house.supervisor.stop(1)


@in_fake_time
async def test_a_reload_keeps_the_workers_that_the_load_needs_and_scales_on() -> None:
    house = await started(House(elastic()))
    clients = [house.submit() for _ in range(3)]
    await asyncio.sleep(8)
    assert house.states == "0:BUSY 1:BUSY 2:BUSY"
    replace = asyncio.create_task(house.supervisor.replace(elastic(max_workers=2), 1))
    await settle()
    assert len(house.lanes) == 2
    for client in clients:
        assert await answered(client) == b"ok"
    await replace
    await house.supervisor.settled()
    await asyncio.sleep(60)
    assert len(house.lanes) == 1
    await house.supervisor.stop(1)


@in_fake_time
async def test_a_reload_ends_the_start_of_an_added_worker() -> None:
    house = await started(House(elastic()))
    FakeGroup.slow = {"m/1": 1000.0}
    clients = [house.submit() for _ in range(2)]
    await asyncio.sleep(4)
    assert house.states == "0:BUSY 1:LOADING"
    FakeGroup.slow = {}
    await house.supervisor.replace(elastic(), 1)
    for client in clients:
        assert await answered(client) == b"ok"
    await house.supervisor.settled()
    assert len(FakeGroup.living()) == 1
    await house.supervisor.stop(1)


@in_fake_time
async def test_what_nobody_foresaw_does_not_end_the_scaling(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    house = await started(House(elastic()))
    with monkeypatch.context() as broken:
        broken.setattr("minserve.worker.crew.Crew.recruit", lambda *_: 1 / 0)
        clients = [house.submit() for _ in range(2)]
        await asyncio.sleep(4)
    assert "ZeroDivisionError" in caplog.text
    await asyncio.sleep(4)
    assert house.states == "0:BUSY 1:BUSY"
    for client in clients:
        assert await answered(client) == b"ok"
    await house.supervisor.stop(1)


@in_fake_time
async def test_a_model_of_a_fixed_size_looks_at_nothing() -> None:
    house = await started(House(crew_spec(min_workers=2, max_workers=2), count=2))
    assert house.supervisor._autoscaler.task is None
    await house.supervisor.stop(1)
