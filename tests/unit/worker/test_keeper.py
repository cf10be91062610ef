"""Restarts, their end, and what is told about them, over a supervisor with one worker."""

import asyncio
import gc
import weakref

import pytest

from minserve.errors import ModelUnhealthy, WorkerFailed
from minserve.telemetry.events import EventKind
from tests.fakes import in_fake_time
from tests.unit.worker.groups import FakeGroup, Files, House, crew_spec, no_ranks, settle


@pytest.fixture(autouse=True)
def fake_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    no_ranks(monkeypatch)


def load_error(text: str = "no weights") -> WorkerFailed:
    return WorkerFailed(f"m/0: rank 1 cannot load: {text}", ("boom",), load_error=text)


async def started(house: House) -> FakeGroup:
    house.supervisor.start()
    await settle()
    return FakeGroup.made[-1]


@in_fake_time
async def test_a_worker_that_fails_is_started_again_after_a_back_off() -> None:
    house = House(crew_spec(backoff=(1.0, 3.0)))
    group = await started(house)
    for delay in (1, 3, 3):
        group.fail(WorkerFailed("m/0: rank 1 died"))
        await asyncio.sleep(delay - 0.1)
        assert house.states == "0:FAILED"
        assert house.lanes == []
        assert FakeGroup.living() == []
        await asyncio.sleep(0.2)
        assert house.states == "0:READY"
        group = FakeGroup.made[-1]
    kinds = house.kinds()
    assert kinds == [EventKind.READY, EventKind.RANK_DIED, EventKind.RESTART] * 3 + [EventKind.READY]
    assert house.details(EventKind.RESTART) == ["restart in 1 s", "restart in 3 s", "restart in 3 s"]
    await house.supervisor.stop(1)


class Cycle:
    """As a group that has ended: its parts know each other."""

    def __init__(self) -> None:
        self.part = self


@in_fake_time
async def test_what_a_failed_group_leaves_is_given_back_with_each_restart() -> None:
    house = House(crew_spec(backoff=(0.0,)))
    group = await started(house)
    gc.disable()  # by itself it comes whenever enough has gathered
    try:
        left = weakref.ref(Cycle())
        group.fail(WorkerFailed("m/0: rank 1 died"))
        await settle()
        assert house.states == "0:READY"
        assert left() is None
    finally:
        gc.enable()
    await house.supervisor.stop(1)


@in_fake_time
async def test_queued_requests_wait_for_the_next_start() -> None:
    house = House(crew_spec(backoff=(2.0,)))
    group = await started(house)
    first, second = house.submit(), house.submit()
    await settle()
    group.fail(WorkerFailed("m/0: rank 1 died"))
    await asyncio.sleep(2)
    await settle()
    FakeGroup.made[-1].finish()
    assert (await second).body == b"ok"
    with pytest.raises(WorkerFailed, match="rank 1 died"):
        await first
    await house.supervisor.stop(1)


@in_fake_time
async def test_clients_in_flight_are_told_when_to_come_again() -> None:
    FakeGroup.load_seconds = 7.0
    house = House(crew_spec(backoff=(0.0, 3.0)))
    house.supervisor.start()
    await asyncio.sleep(7)
    for retry_after in (7, 10):
        client = house.submit()
        await settle()
        FakeGroup.made[-1].fail(WorkerFailed("m/0: rank 1 died"))
        with pytest.raises(WorkerFailed) as caught:
            await client
        assert caught.value.retry_after == retry_after
        await asyncio.sleep(20)
    await house.supervisor.stop(1)


@in_fake_time
async def test_where_another_worker_serves_they_need_not_wait() -> None:
    house = House(count=2)
    house.supervisor.start()
    await settle()
    client = house.submit()
    await settle()
    (busy,) = [group for group in FakeGroup.made if group.busy]
    busy.fail(WorkerFailed("m/0: rank 1 died"))
    with pytest.raises(WorkerFailed) as caught:
        await client
    assert caught.value.retry_after is None
    await house.supervisor.stop(1)


@in_fake_time
async def test_when_the_window_is_over_the_model_is_given_up_and_what_waits_is_answered() -> None:
    FakeGroup.failing = {"connect": WorkerFailed("m/0: rank 1 is missing")}
    house = House(crew_spec(backoff=(1.0,), max_retry_timeout_in_sec=5.0), devices=1)
    waiting = house.submit()
    await started(house)
    assert house.unhealthy() is None
    await asyncio.sleep(6)
    for client in (waiting, house.submit()):
        with pytest.raises(ModelUnhealthy, match='Model "m" is unhealthy: m/0: rank 1 is missing') as caught:
            await client
        assert not caught.value.retryable
    assert house.unhealthy() == house.not_ready() == "m/0: rank 1 is missing"
    assert house.details(EventKind.GIVEN_UP) == ["m/0: rank 1 is missing"]
    assert house.details(EventKind.START_FAILED) == ["m/0: rank 1 is missing"] * 6
    assert house.allocator._shared == {}, "another model may have its device"
    starts = len(FakeGroup.made)
    await asyncio.sleep(1000)
    assert len(FakeGroup.made) == starts == 6
    await house.supervisor.stop(1)


@in_fake_time
async def test_restarts_count_anew_once_a_worker_has_served() -> None:
    house = House(crew_spec(torchrun={"max_restarts": 1}))
    group = await started(house)
    for served in (True, True, False):
        group.served = served
        group.fail(WorkerFailed("m/0: rank 1 died"))
        await asyncio.sleep(0.1)
        assert (house.unhealthy() is None) == served
        group = FakeGroup.made[-1]
    await house.supervisor.stop(1)


@in_fake_time
async def test_the_same_load_error_three_times_is_a_crash_loop() -> None:
    FakeGroup.loads = [load_error(), load_error(), load_error()]
    house = House()
    await started(house)
    assert len(FakeGroup.made) == 3
    verdict = str(house.unhealthy())
    assert verdict.startswith("m/0: rank 1 cannot load: no weights (3 starts in a row, ")
    (event,) = [event for event in house.events.latest() if event.kind is EventKind.GIVEN_UP]
    assert event.detail == verdict
    await house.supervisor.stop(1)


@pytest.mark.parametrize("otherwise", ["a file", "the error", "no load error", "READY"])
@in_fake_time
async def test_what_differs_is_no_crash_loop(otherwise: str) -> None:
    third: dict[str, Exception | None] = {
        "the error": load_error("other weights"),
        "no load error": WorkerFailed("m/0: not loaded within 20 s"),
        "READY": None,
    }
    FakeGroup.loads = [load_error(), load_error(), third.get(otherwise, load_error())]
    FakeGroup.load_seconds = 1.0
    house = House()
    house.supervisor.start()
    await asyncio.sleep(2.5)
    if otherwise == "a file":
        Files.state = "edited"
    await asyncio.sleep(2.5)
    assert house.unhealthy() is None
    assert house.states == "0:READY"
    await house.supervisor.stop(1)


@in_fake_time
async def test_what_nobody_foresaw_is_logged_and_counts_as_a_failed_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    house = House(crew_spec(backoff=(1.0,)))
    group = await started(house)
    group.fail(WorkerFailed("m/0: rank 1 died"))
    FakeGroup.failing = {"kill": OSError("too many open files")}
    await asyncio.sleep(0.1)
    FakeGroup.failing = {}
    assert "m/0: unforeseen" in caplog.text
    assert "too many open files" in caplog.text
    await asyncio.sleep(1)
    assert house.states == "0:READY"
    assert FakeGroup.living() == [FakeGroup.made[-1]]
    assert "OSError: too many open files" in house.details(EventKind.START_FAILED)[0]
    await house.supervisor.stop(1)


@in_fake_time
async def test_every_change_is_told() -> None:
    FakeGroup.loads = [WorkerFailed("no")]
    house = House()
    await started(house)
    assert house.changes >= 2
    await house.supervisor.stop(1)
