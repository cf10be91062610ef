"""How many workers there are, which spec they serve, and what clients notice of a change: nothing."""

import asyncio
import dataclasses
from collections.abc import Callable

import pytest

from minserve.dispatch.request import Reply
from minserve.errors import Draining, ModelNotFound, ModelUnhealthy, NoWorkers, WorkerFailed
from minserve.telemetry.events import EventKind
from minserve.worker.devices import DeviceAllocator, Inventory
from minserve.worker.spec import ModelSpec
from tests.fakes import in_fake_time
from tests.unit.worker.groups import FakeGroup, House, answered, crew_spec, elastic, no_ranks, settle, started


@pytest.fixture(autouse=True)
def fake_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    no_ranks(monkeypatch)


# ── health ──


@in_fake_time
async def test_a_model_is_ready_with_its_first_ready_worker_and_says_why_it_is_not() -> None:
    FakeGroup.slow = {"m/0": 5.0, "m/1": 9.0}
    house = await started(House(count=2))
    assert house.not_ready() == "m/0 is LOADING; m/1 is LOADING"
    await asyncio.sleep(6)
    assert house.not_ready() is None
    FakeGroup.made[0].fail(WorkerFailed("m/0: rank 1 died"))
    assert house.not_ready() == "m/0 is FAILED; m/1 is LOADING", "at once, not when somebody has cleaned up"
    await asyncio.sleep(0.1)
    assert house.not_ready() == "m/0 is LOADING, its last error was: m/0: rank 1 died; m/1 is LOADING"
    await asyncio.sleep(10)
    assert house.not_ready() is None
    await house.supervisor.stop(1)
    assert house.not_ready() is not None


@in_fake_time
async def test_while_one_worker_may_serve_the_model_is_not_unhealthy() -> None:
    FakeGroup.loads = [WorkerFailed("m/0: no")]
    house = await started(House(crew_spec(torchrun={"max_restarts": 0}), count=2))
    assert house.states == "0:FAILED 1:READY"
    assert house.unhealthy() is None
    client = house.submit()
    await settle()
    FakeGroup.made[1].fail(WorkerFailed("m/1: rank 1 died"))
    queued = house.submit()
    with pytest.raises(WorkerFailed):
        await client
    with pytest.raises(ModelUnhealthy, match="m/1: rank 1 died"):
        await queued
    assert house.unhealthy() == "m/1: rank 1 died"
    await house.supervisor.stop(1)


@in_fake_time
async def test_a_worker_that_is_added_revives_a_model_that_was_given_up_meanwhile() -> None:
    FakeGroup.load_seconds = 5.0
    house = await started(House(elastic(torchrun={"max_restarts": 0})))
    await asyncio.sleep(6)
    clients = [house.submit(), house.submit()]
    await asyncio.sleep(4)
    assert house.states == "0:BUSY 1:LOADING"
    FakeGroup.made[0].fail(WorkerFailed("m/0: rank 1 died"))
    await settle()
    assert house.not_ready() == house.unhealthy() == "m/0: rank 1 died"
    for client in clients:
        with pytest.raises((WorkerFailed, ModelUnhealthy)):
            await client
    await asyncio.sleep(5)
    assert house.unhealthy() is None
    assert house.not_ready() is None
    assert house.kinds()[-2:] == [EventKind.REVIVED, EventKind.SCALED]
    assert await answered(house.submit()) == b"ok"
    await house.supervisor.stop(1)


# ── the end ──


def hang(step: str) -> Callable[[], None]:
    return lambda: FakeGroup.hanging.add(step)


def fail() -> None:
    FakeGroup.failing["connect"] = WorkerFailed("no")


@pytest.mark.parametrize("prepare", [lambda: None, hang("connect"), hang("load"), fail])
@in_fake_time
async def test_a_stop_is_obeyed_in_every_state_and_answers_what_waits(prepare: Callable[[], None]) -> None:
    prepare()
    house = House(crew_spec(backoff=(3600.0,), max_retry_timeout_in_sec=7200.0), devices=1)
    house.supervisor.start()
    await settle()
    busy = FakeGroup.made[0].has_place() and house.lanes
    waiting = [house.submit(), house.submit()]
    await settle()
    stop = asyncio.create_task(house.supervisor.stop(7.5))
    await settle()
    for client in (*(waiting[1:] if busy else waiting), house.submit()):
        with pytest.raises(Draining, match="shutting down"):
            await client
    if busy:
        assert house.states == "0:DRAINING"
        FakeGroup.made[0].finish()
        assert (await waiting[0]).body == b"ok"
    await stop
    assert house.states == "0:STOPPED"
    assert FakeGroup.living() == []
    assert house.allocator._shared == {}
    assert len(FakeGroup.made) == 1
    assert asyncio.all_tasks() - set(waiting) == {asyncio.current_task()}


@pytest.mark.parametrize("change", ["leaving", "replacing", "scaling", "draining first"])
@in_fake_time
async def test_a_stop_that_is_cancelled_ends_all_at_once(change: str) -> None:
    spec = crew_spec(2, min_workers=1, max_workers=2)
    house = await started(House(spec, devices=3 if change == "draining first" else 8))
    clients = [house.submit() for _ in range(2)]
    await settle()
    FakeGroup.load_seconds = 100.0
    replacing = None
    if change in ("replacing", "draining first"):
        replacing = asyncio.create_task(house.supervisor.replace(spec, 1))
    elif change == "leaving":
        FakeGroup.load_seconds = 0.0
        await house.supervisor.replace(house.spec, 1)
    else:
        await asyncio.sleep(5)
        assert house.states == "0:BUSY 1:LOADING"
    await settle()
    stop = asyncio.create_task(house.supervisor.stop(30))
    await settle()
    began = asyncio.get_running_loop().time()
    stop.cancel()
    await asyncio.wait([stop, *clients])
    assert asyncio.get_running_loop().time() - began < 1
    assert FakeGroup.living() == []
    assert {report.state for report in house.supervisor.report()} <= {"STOPPED"}
    if replacing is not None:
        with pytest.raises(Draining):
            await replacing
    for client in clients:
        assert client.exception() is not None


# ── another spec ──


@in_fake_time
async def test_a_reload_under_load_fails_no_request() -> None:
    FakeGroup.load_seconds = 3.0
    house = House(crew_spec(), count=2, devices=4)
    house.supervisor.start()
    clients: list[asyncio.Task[Reply]] = []

    async def load() -> None:
        while True:
            clients.append(house.submit())
            await asyncio.sleep(0.2)

    async def ranks() -> None:
        while True:
            for group in FakeGroup.living():
                if group.busy:
                    group.finish()
            await asyncio.sleep(0.15)

    background = [asyncio.create_task(load()), asyncio.create_task(ranks())]
    await asyncio.sleep(5)
    spec = dataclasses.replace(crew_spec(batch_size=4), queue_limit=50)
    for _ in range(3):
        before = house.lanes
        task = asyncio.create_task(house.supervisor.replace(spec, 2))
        await asyncio.sleep(2)
        assert house.lanes == before, "the old ones serve until the new ones are READY"
        await task
        assert not set(house.lanes) & set(before)
        await house.supervisor.settled()
        assert len(FakeGroup.living()) == 2
    background[0].cancel()
    await asyncio.wait(clients)
    background[1].cancel()
    assert len(clients) > 50
    assert {bytes(client.result().body) for client in clients} == {b"ok"}
    assert house.kinds().count(EventKind.RELOADED) == 3
    assert house.dispatcher._batch_size == 4
    assert house.dispatcher.remaining == 50
    assert {group.spec.config.batch_size for group in FakeGroup.living()} == {4}
    await house.supervisor.stop(1)


@in_fake_time
async def test_the_old_workers_go_on_when_the_new_ones_do_not_start() -> None:
    house = await started(House(devices=4))
    before = house.lanes
    FakeGroup.loads = [WorkerFailed("m/1: rank 0 cannot load: a typo", load_error="a typo")]
    with pytest.raises(WorkerFailed, match="a typo"):
        await house.supervisor.replace(crew_spec(batch_size=4), 2)
    assert house.lanes == before
    assert house.dispatcher._batch_size == 1
    assert house.details(EventKind.RELOAD_FAILED) == ["m/1: rank 0 cannot load: a typo"]
    assert await answered(house.submit()) == b"ok"
    await house.supervisor.settled()
    assert FakeGroup.living() == [FakeGroup.made[0]]
    assert list(house.allocator._shared) == ["m/0"]
    FakeGroup.made[0].fail(WorkerFailed("m/0: rank 0 died"))
    await settle()
    assert FakeGroup.made[-1].spec == house.spec, "a restart is one of the old spec, too"
    await house.supervisor.stop(1)


def fixed(batch_size: int = 1) -> ModelSpec:
    return crew_spec(2, torchrun={"rdzv_endpoint": "localhost:29400"}, batch_size=batch_size)


@pytest.mark.parametrize(
    ("old", "new", "devices", "first"),
    [
        (crew_spec(2), crew_spec(2), 4, "new"),
        (crew_spec(2), crew_spec(2), 3, "old"),
        (crew_spec(2), crew_spec(2), 0, "new"),
        (fixed(), fixed(), 4, "old"),
        (fixed(), crew_spec(2), 4, "new"),
        (crew_spec(1), crew_spec(1), 1, "new"),  # one device is enough for both
        (crew_spec(1), crew_spec(2), 2, "old"),
    ],
)
@in_fake_time
async def test_where_two_cannot_live_at_once_the_old_one_leaves_first(
    old: ModelSpec, new: ModelSpec, devices: int, first: str
) -> None:
    FakeGroup.load_seconds = 3.0
    house = House(old, devices=devices)
    house.supervisor.start()
    await asyncio.sleep(5)
    in_flight = house.submit()
    await settle()
    replace = asyncio.create_task(house.supervisor.replace(new, 1))
    await asyncio.sleep(1)
    assert len(FakeGroup.made) == (2 if first == "new" else 1)
    if first == "old":
        assert house.states == "0:DRAINING"
        FakeGroup.made[0].finish()
        assert (await in_flight).body == b"ok"
        waiting = house.submit()
        await asyncio.sleep(1)
        assert house.states == "0:LOADING"
        assert FakeGroup.living() == [FakeGroup.made[1]]
        assert house.not_ready() == "m/0 is LOADING"
        assert house.dispatcher.queued == 1, "it waits for the new one"
        await replace
        assert await answered(waiting) == b"ok"
    else:
        assert await answered(in_flight) == b"ok"
        await replace
    assert house.lanes[0]._spec is new
    await house.supervisor.stop(1)


@in_fake_time
async def test_an_old_worker_that_left_first_is_started_again_when_the_new_one_does_not_start() -> None:
    house = await started(House(fixed()))
    FakeGroup.loads = [WorkerFailed("m/0: rank 0 cannot load: a typo")]
    with pytest.raises(WorkerFailed, match="a typo"):
        await house.supervisor.replace(fixed(batch_size=4), 1)
    await settle()
    assert house.states == "0:READY"
    assert house.lanes[0]._spec is house.spec
    assert house.unhealthy() is None
    assert await answered(house.submit()) == b"ok"
    await house.supervisor.stop(1)


@in_fake_time
async def test_a_model_that_was_given_up_is_revived() -> None:
    FakeGroup.loads = [WorkerFailed("m/0: no")] * 2
    house = await started(House(crew_spec(torchrun={"max_restarts": 0}), count=2, devices=1))
    assert house.unhealthy() is not None
    FakeGroup.loads = [WorkerFailed("m/2: still none")]
    with pytest.raises(WorkerFailed, match="still none"):
        await house.supervisor.replace(house.spec, 1)
    assert house.unhealthy() == "m/2: still none"
    with pytest.raises(ModelUnhealthy, match="still none"):
        await house.submit()
    await house.supervisor.replace(house.spec, 1)
    assert house.unhealthy() is None
    assert await answered(house.submit()) == b"ok"
    assert house.kinds()[-2:] == [EventKind.READY, EventKind.REVIVED]
    await house.supervisor.settled()
    assert len(house.supervisor.report()) == 1
    await house.supervisor.stop(1)


@in_fake_time
async def test_a_model_that_was_never_started_is_brought_up_or_unhealthy() -> None:
    FakeGroup.loads = [WorkerFailed("m/0: no")]
    house = House()
    waiting = house.submit()
    with pytest.raises(WorkerFailed):
        await house.supervisor.replace(house.spec, 1)
    assert house.unhealthy() == "m/0: no"
    with pytest.raises(ModelUnhealthy):
        await waiting
    await house.supervisor.replace(house.spec, 1)
    assert await answered(house.submit()) == b"ok"
    await house.supervisor.stop(1)


@in_fake_time
async def test_a_second_reload_waits_for_those_that_still_leave() -> None:
    house = await started(House(crew_spec(2), devices=4))
    slow = house.submit()
    await settle()
    await house.supervisor.replace(crew_spec(2), 1)
    await settle()
    assert house.states == "0:DRAINING 1:READY"
    again = asyncio.create_task(house.supervisor.replace(crew_spec(2), 1))
    await asyncio.sleep(5)
    assert house.states == "0:DRAINING 1:READY", "there are devices for two, and one more would leave none serving"
    FakeGroup.made[0].finish()
    assert (await slow).body == b"ok"
    await again
    await house.supervisor.settled()
    assert house.states == "0:READY"
    await house.supervisor.stop(1)


@in_fake_time
async def test_a_restart_during_a_reload_changes_nothing() -> None:
    house = await started(House(devices=4))
    FakeGroup.slow = {"m/1": 5.0}
    replace = asyncio.create_task(house.supervisor.replace(crew_spec(batch_size=4), 1))
    await asyncio.sleep(1)
    FakeGroup.made[0].fail(WorkerFailed("m/0: rank 0 died"))
    await asyncio.sleep(1)
    assert house.states == "0:READY 1:LOADING"
    await replace
    await house.supervisor.settled()
    assert house.states == "1:READY"
    assert len(FakeGroup.living()) == 1
    await house.supervisor.stop(1)


@in_fake_time
async def test_a_caller_that_leaves_ends_the_change_it_waits_for() -> None:
    house = await started(House())
    FakeGroup.hanging = {"load"}
    replace = asyncio.create_task(house.supervisor.replace(crew_spec(), 1))
    await settle()
    replace.cancel()
    await asyncio.wait([replace])
    await settle()
    assert house.states == "0:READY"
    FakeGroup.hanging = set()
    await house.supervisor.replace(crew_spec(), 1)
    await house.supervisor.stop(1)
    with pytest.raises(Draining):
        await house.supervisor.replace(crew_spec(), 1)


@in_fake_time
async def test_two_models_share_one_account_of_devices() -> None:
    allocator = DeviceAllocator(Inventory(("0", "1")))
    first = await started(House(crew_spec(2), allocator=allocator))
    second = await started(House(dataclasses.replace(crew_spec(2), name="n"), allocator=allocator))
    assert first.states == "0:READY"
    assert "n/0 needs 2 device(s), 0 of 2 are free; m/0 owns 0, 1" in str(second.not_ready())
    await first.supervisor.stop(1)
    await second.supervisor.stop(1)


@in_fake_time
async def test_a_stop_gives_a_worker_that_leaves_already_no_longer_than_the_others() -> None:
    """On a reload it may take as long as any batch may."""
    house = await started(House(crew_spec()))
    client = house.submit()
    await settle()
    await house.supervisor.replace(house.spec, 1)
    await settle()
    assert house.states == "0:DRAINING 1:READY"
    loop = asyncio.get_running_loop()
    began = loop.time()
    await house.supervisor.stop(3.0)
    assert loop.time() - began == pytest.approx(3.0, abs=0.1)
    with pytest.raises(WorkerFailed):
        await client
    assert FakeGroup.living() == []


# ── another number of workers ──


@in_fake_time
async def test_workers_are_added_and_taken_away_without_a_failed_request() -> None:
    house = await started(House(crew_spec()))
    slow = house.submit()
    await settle()
    await house.supervisor.resize(3, 3)
    await settle()
    assert house.states == "0:BUSY 1:READY 2:READY"
    await house.supervisor.resize(1, 1)
    await settle()
    assert house.states == "0:BUSY", "the busy one stays"
    assert await answered(slow) == b"ok"
    assert house.supervisor._autoscaler.task is None
    assert house.details(EventKind.SCALED) == [
        "1 → 3 workers: asked for 3 to 3",
        "3 → 1 workers: asked for 1 to 1",
    ]
    await house.supervisor.stop(1)


@in_fake_time
async def test_between_the_fewest_and_the_most_the_load_decides() -> None:
    house = await started(House(crew_spec()))
    await house.supervisor.resize(1, 2)
    clients = [house.submit(), house.submit()]
    await asyncio.sleep(4)
    assert house.states == "0:BUSY 1:BUSY"
    for client in clients:
        assert await answered(client) == b"ok"
    await asyncio.sleep(15)
    assert len(house.lanes) == 1
    await house.supervisor.stop(1)


@in_fake_time
async def test_without_a_worker_requests_are_refused_at_once_and_what_is_in_flight_finishes() -> None:
    house = await started(House(crew_spec()))
    in_flight, waiting = house.submit(), house.submit()
    await settle()
    await house.supervisor.resize(0, 2)
    for client in (waiting, house.submit()):
        with pytest.raises(NoWorkers, match=r'^Model "m" has no worker to serve'):
            await client
    await settle()
    assert house.states == "0:DRAINING"
    assert await answered(in_flight) == b"ok"
    await house.supervisor.settled()
    assert house.states == ""
    assert house.not_ready() is None, "nobody has asked for a worker"
    await asyncio.sleep(100)
    assert house.states == ""
    await house.supervisor.resize(1, 1)
    assert await answered(house.submit()) == b"ok"
    await house.supervisor.stop(1)


@in_fake_time
async def test_a_model_may_start_without_a_worker_and_be_replaced_so() -> None:
    house = await started(House(crew_spec(), count=0))
    with pytest.raises(NoWorkers):
        await house.submit()
    await house.supervisor.started()
    await house.supervisor.replace(crew_spec(batch_size=2), 0)
    with pytest.raises(NoWorkers):
        await house.submit()
    await house.supervisor.replace(crew_spec(batch_size=2), 1)
    assert await answered(house.submit()) == b"ok"
    await house.supervisor.stop(1)


@in_fake_time
async def test_a_resize_starts_others_in_the_place_of_workers_that_were_given_up() -> None:
    FakeGroup.loads = [WorkerFailed("m/0: no")]
    house = await started(House(crew_spec(torchrun={"max_restarts": 0})))
    assert house.unhealthy() == "m/0: no"
    await house.supervisor.resize(1, 1)
    await house.supervisor.started()
    assert house.unhealthy() is None
    assert await answered(house.submit()) == b"ok"
    await house.supervisor.stop(1)


@in_fake_time
async def test_whoever_waits_for_the_start_is_told_when_all_are_ready() -> None:
    FakeGroup.slow = {"m/0": 3.0, "m/1": 5.0}
    house = House(crew_spec(), count=2)
    house.supervisor.start()
    loop = asyncio.get_running_loop()
    began = loop.time()
    await house.supervisor.started()
    assert loop.time() - began == pytest.approx(5.0, abs=0.1)
    await house.supervisor.started()
    await house.supervisor.stop(1)


@in_fake_time
async def test_whoever_waits_for_the_start_is_told_of_the_first_failure_though_it_is_tried_again() -> None:
    FakeGroup.slow = {"m/1": 2.0}
    house = House(crew_spec(), count=2)
    house.supervisor.start()
    await settle()
    FakeGroup.loads = [WorkerFailed("m/1: no weights")]
    with pytest.raises(WorkerFailed, match="no weights"):
        await house.supervisor.started()
    FakeGroup.slow = {}
    await settle()
    assert house.states == "0:READY 1:READY"
    FakeGroup.made[0].fail(WorkerFailed("m/0: rank 0 died"))
    await settle()
    await house.supervisor.started()  # it has come back: old failures count no more
    await house.supervisor.stop(1)


@in_fake_time
async def test_whoever_waits_for_the_start_is_told_when_the_model_is_stopped() -> None:
    FakeGroup.hanging = {"load"}
    house = await started(House())
    waiting = asyncio.create_task(house.supervisor.started())
    await settle()
    await house.supervisor.stop(0, ModelNotFound("Model not found: m"))
    with pytest.raises(ModelNotFound):
        await waiting
    with pytest.raises(ModelNotFound):
        await house.submit()
    with pytest.raises(Draining):
        await house.supervisor.resize(1, 1)


@in_fake_time
async def test_versions_of_a_model_have_devices_of_their_own() -> None:
    allocator = DeviceAllocator(Inventory(("0", "1", "2")))
    first = await started(House(crew_spec(2), allocator=allocator))
    second = await started(House(dataclasses.replace(crew_spec(2), version="2.0"), allocator=allocator))
    assert "m:2.0/0 needs 2 device(s), 1 of 3 are free; m/0 owns 0, 1" in str(second.not_ready())
    await first.supervisor.stop(1)
    await second.supervisor.stop(1)
