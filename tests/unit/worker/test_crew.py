"""Who gets which number, and what happens to those on trial."""

import asyncio
from pathlib import Path

import pytest

from minserve.dispatch.dispatcher import Dispatcher
from minserve.errors import WorkerFailed
from minserve.telemetry.events import EventLog
from minserve.worker.crew import Crew
from minserve.worker.devices import DeviceAllocator, Inventory
from tests.fakes import in_fake_time
from tests.unit.worker.groups import FakeGroup, crew_spec, no_ranks, no_starter, settle


@pytest.fixture(autouse=True)
def fake_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    no_ranks(monkeypatch)


def make_crew(devices: int = 0) -> Crew:
    dispatcher = Dispatcher(asyncio.get_running_loop(), "m", 1, 0.0, 10)
    allocator = DeviceAllocator(Inventory(tuple(map(str, range(devices)))))
    places = (Path("/run/m1"), dispatcher, allocator, no_starter(), EventLog("m"))
    return Crew(*places, lambda keeper, error: None, lambda: None)


def numbers(crew: Crew) -> list[int]:
    return [report.number for report in crew.report()]


@in_fake_time
async def test_a_worker_has_the_lowest_number_that_is_free() -> None:
    crew = make_crew()
    crew.begin(crew_spec(2), 3)
    await settle()
    assert numbers(crew) == [0, 1, 2]
    crew.let_go(crew.in_charge[1], 0.0)
    assert numbers(crew) == [0, 1, 2], "one that leaves has its number until it has ended"
    await crew.settled()
    assert numbers(crew) == [0, 2]
    assert [keeper.worker.number for keeper in crew.recruit(crew_spec(2), 2)] == [1, 3]
    await crew.stop(0.0)


@pytest.mark.parametrize(("old", "new", "got"), [(2, 4, [1, 2]), (4, 2, [2, 3]), (1, 2, [1, 2]), (4, 1, [4, 5])])
@in_fake_time
async def test_workers_with_more_or_fewer_ranks_get_endpoints_of_their_own(old: int, new: int, got: list[int]) -> None:
    crew = make_crew()
    crew.begin(crew_spec(old), 1)
    keepers = crew.recruit(crew_spec(new), 2)
    assert [keeper.worker.number for keeper in keepers] == got
    await crew.stop(0.0)


@in_fake_time
async def test_those_on_trial_serve_once_they_are_put_in_charge() -> None:
    crew = make_crew()
    new = crew.recruit(crew_spec(), 2)
    await crew.start(new)
    assert [report.serving for report in crew.report()] == [True, True]
    before = crew.serving
    crew.take_over(new)
    assert (before, crew.serving) == (False, True)
    assert crew.on_trial == []
    await crew.stop(0.0)


@in_fake_time
async def test_of_those_on_trial_all_must_start_or_none_is_left() -> None:
    FakeGroup.loads = [None, WorkerFailed("m/1: no")]
    FakeGroup.load_seconds = 1.0
    crew = make_crew()
    with pytest.raises(WorkerFailed, match="m/1: no"):
        await crew.start(crew.recruit(crew_spec(), 3))
    await crew.settled()
    assert crew.report() == []
    assert FakeGroup.living() == []


@in_fake_time
async def test_one_that_dies_while_the_others_start_has_failed_its_trial() -> None:
    FakeGroup.slow = {"m/1": 5.0}
    crew = make_crew()
    start = asyncio.create_task(crew.start(crew.recruit(crew_spec(), 2)))
    await asyncio.sleep(1)
    FakeGroup.made[0].fail(WorkerFailed("m/0: rank 0 died"))
    await asyncio.sleep(5)
    with pytest.raises(WorkerFailed, match="m/0: rank 0 died"):
        await start
    await crew.settled()
    assert crew.report() == []
    assert FakeGroup.living() == []


@in_fake_time
async def test_one_in_charge_is_restarted() -> None:
    crew = make_crew()
    new = crew.recruit(crew_spec(), 1)
    await crew.start(new)
    crew.take_over(new)
    FakeGroup.made[0].fail(WorkerFailed("m/0: rank 0 died"))
    await settle()
    assert [(report.restarts, report.serving) for report in crew.report()] == [(1, True)]
    await crew.stop(0.0)


@in_fake_time
async def test_a_trial_that_is_cancelled_leaves_nobody() -> None:
    FakeGroup.hanging = {"connect"}
    crew = make_crew()
    start = asyncio.create_task(crew.start(crew.recruit(crew_spec(), 2)))
    await settle()
    assert len(FakeGroup.living()) == 2
    start.cancel()
    await asyncio.wait([start])
    await crew.settled()
    assert FakeGroup.living() == []
    assert crew.report() == []


@in_fake_time
async def test_devices_are_taken_for_all_or_for_none() -> None:
    crew = make_crew(devices=3)
    spec = crew_spec(2)
    assert not crew.reserve(crew.recruit(spec, 2)), "there are enough for one of them"
    assert crew.on_trial == []
    new = crew.recruit(spec, 1)
    assert crew.reserve(new), "those that the first one had taken are free again"
    assert crew.on_trial == new
    await crew.stop(0.0)
