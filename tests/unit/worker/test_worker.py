import asyncio
import math
from pathlib import Path

import pytest

from minserve.dispatch.dispatcher import Dispatcher
from minserve.dispatch.request import Reply, Request
from minserve.errors import WorkerFailed
from minserve.telemetry.events import EventKind, EventLog
from minserve.wire.messages import RequestMeta
from minserve.worker.blame import AGENT, Cause, What
from minserve.worker.devices import DeviceAllocator, Inventory
from minserve.worker.reports import RankReport
from minserve.worker.states import State
from minserve.worker.worker import Worker
from tests.unit.worker.groups import FakeGroup, no_ranks, no_starter
from tests.unit.worker.specs import make_spec, model_config, until

pytestmark = pytest.mark.asyncio

TWO_GPUS = Inventory(("4", "5"))


@pytest.fixture(autouse=True)
def fake_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    no_ranks(monkeypatch)


class Setup:
    def __init__(self, number: int = 0, inventory: Inventory = TWO_GPUS, **minserve: object) -> None:
        self.dispatcher = Dispatcher(asyncio.get_running_loop(), "m", 1, 0.0, 10)
        self.allocator = DeviceAllocator(inventory)
        self.events = EventLog("m")
        spec = make_spec(2, config=model_config("tp", minserve, parallel_level=2))
        self.worker = Worker(spec, number, Path("/run/m1"), self.dispatcher, self.allocator, no_starter(), self.events)

    def state(self) -> State:
        return self.worker.state

    @property
    def group(self) -> FakeGroup:
        return FakeGroup.made[-1]

    def submit(self) -> asyncio.Task[Reply]:
        loop = asyncio.get_running_loop()
        request = Request(RequestMeta("", (), ()), [], math.inf, loop.create_future())
        return asyncio.create_task(self.dispatcher.submit(request))

    async def start(self) -> None:
        await self.worker.start()
        self.worker.serve()

    async def make_busy(self) -> asyncio.Task[Reply]:
        client = self.submit()
        await until(lambda: self.group.batches)
        return client

    @property
    def devices_are_free(self) -> bool:
        spec = make_spec(2, config=model_config("tp", parallel_level=2))
        try:
            self.allocator.reserve("another", spec.config, 2)
        except Exception:
            return False
        self.allocator.release("another")
        return True


async def test_a_start_goes_through_launch_connect_and_load_and_only_then_takes_batches() -> None:
    setup = Setup()
    client = setup.submit()
    FakeGroup.hanging = {"load"}
    start = asyncio.create_task(setup.worker.start())
    await until(lambda: FakeGroup.made and "load" in setup.group.calls)
    assert setup.state() is State.LOADING
    assert not setup.worker.has_place()
    assert setup.group.batches == []
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)

    FakeGroup.hanging = set()
    await setup.worker.start()
    assert setup.state() is State.READY
    assert setup.group.batches == [], "one on trial takes none"
    setup.worker.serve()
    await until(lambda: setup.group.batches)
    assert setup.state() is State.BUSY
    setup.group.finish()
    await client
    assert setup.state() is State.READY
    assert setup.group.calls == ["launch", "connect", "load"]


@pytest.mark.parametrize(("accept", "given"), [(3.0, 3.0), (30.0, 20.0)])
async def test_one_limit_stands_over_start_and_load(accept: float, given: float) -> None:
    setup = Setup(accept_timeout=accept)
    await setup.worker.start()
    assert setup.group.accept_timeout == given
    assert 15 < setup.group.load_timeout <= 20


@pytest.mark.parametrize("step", ["launch", "connect", "load"])
async def test_a_failed_start_ends_everything_and_keeps_the_reason_and_the_devices(
    step: str, caplog: pytest.LogCaptureFixture
) -> None:
    setup = Setup()
    FakeGroup.failing = {step: WorkerFailed("m/0: rank 1 is missing", ("boom",))}
    with pytest.raises(WorkerFailed, match="rank 1 is missing"):
        await setup.worker.start()
    assert setup.state() is State.FAILED
    assert setup.group.calls[-1] == "kill"
    report = setup.worker.report()
    assert (report.last_error, report.last_lines, report.serving) == ("m/0: rank 1 is missing", ("boom",), False)
    assert "m/0: rank 1 is missing\n    boom" in caplog.text
    assert not setup.devices_are_free, "or a single process would sit down on one before the restart"

    assert not setup.worker.served
    FakeGroup.failing = {}
    await setup.worker.start()
    assert setup.worker.report().restarts == 1
    assert setup.state() is State.READY


async def test_without_devices_a_start_fails_and_says_who_has_them() -> None:
    setup = Setup(inventory=Inventory(("0",)))
    with pytest.raises(WorkerFailed, match="m/0 needs 2 device"):
        await setup.worker.start()
    assert setup.state() is State.FAILED
    assert FakeGroup.made == []


async def test_what_nobody_foresaw_leaves_no_process_behind_and_is_a_reason_too() -> None:
    setup = Setup()
    FakeGroup.failing = {"connect": OSError("too many open files")}
    with pytest.raises(WorkerFailed, match="m/0: OSError: too many"):
        await setup.worker.start()
    assert setup.group.calls[-1] == "kill"
    assert setup.state() is State.FAILED
    assert "too many open files" in setup.worker.report().last_error
    setup.worker.release()
    assert setup.devices_are_free


async def test_a_group_whose_end_went_wrong_is_ended_before_the_next_one_is_made() -> None:
    setup = Setup()
    FakeGroup.failing = {"load": WorkerFailed("no"), "kill": OSError("no file descriptors")}
    with pytest.raises(OSError, match="no file descriptors"):
        await setup.worker.start()
    (first,) = FakeGroup.made
    FakeGroup.failing = {"kill": OSError("still none")}
    with pytest.raises(OSError, match="still none"):
        await setup.worker.start()
    assert FakeGroup.made == [first], "there is no second group while the first may live"
    FakeGroup.failing = {}
    await setup.worker.start()
    assert first.calls[-1] == "kill"
    assert setup.state() is State.READY


@pytest.mark.parametrize("step", ["connect", "load"])
async def test_a_start_that_is_cancelled_ends_what_it_has_started(step: str) -> None:
    setup = Setup()
    FakeGroup.hanging = {step}
    start = asyncio.create_task(setup.worker.start())
    await until(lambda: FakeGroup.made and step in setup.group.calls)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert setup.group.calls[-1] == "kill"
    assert setup.state() is State.STOPPED
    assert setup.devices_are_free


async def test_clients_in_flight_read_when_the_worker_will_be_back() -> None:
    setup = Setup()
    setup.worker.comeback = lambda served: 7.0 if served else 3.0
    await setup.start()
    client = await setup.make_busy()
    setup.group.served = True
    setup.group.fail(WorkerFailed("m/0: rank 1 died"))
    with pytest.raises(WorkerFailed) as caught:
        await client
    assert caught.value.retry_after == 7
    await setup.worker.failed()


async def test_a_failure_that_nobody_has_attended_to_yet_is_one_already() -> None:
    setup = Setup()
    await setup.start()
    assert setup.worker.serving
    setup.group.fail(WorkerFailed("m/0: rank 1 died"))
    assert (setup.state(), setup.worker.serving) == (State.FAILED, False)
    await setup.worker.failed()
    assert setup.state() is State.FAILED


@pytest.mark.parametrize("served", [True, False])
async def test_a_ready_worker_that_fails_takes_no_more_batches_and_is_killed(served: bool) -> None:
    setup = Setup()
    await setup.start()
    failed = asyncio.create_task(setup.worker.failed())
    setup.group.served = served
    setup.group.failed.set_result(WorkerFailed("m/0: rank 1 died"))
    assert str(await failed) == "m/0: rank 1 died"
    assert setup.state() is State.FAILED
    assert setup.group.calls[-1] == "kill"
    client = setup.submit()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert setup.group.batches == []
    assert setup.worker.served == served
    assert setup.dispatcher.queued == 1, "it waits for the next incarnation"
    client.cancel()
    await asyncio.gather(client, return_exceptions=True)


async def test_waiting_for_a_failure_can_be_cancelled_without_ending_the_worker() -> None:
    setup = Setup()
    await setup.worker.start()
    waiting = asyncio.create_task(setup.worker.failed())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not setup.group.failed.cancelled()
    assert setup.state() is State.READY


async def test_a_stop_lets_the_batch_in_flight_finish_and_then_ends_the_ranks() -> None:
    setup = Setup(exit_timeout=3.0)
    await setup.start()
    client = await setup.make_busy()
    stop = asyncio.create_task(setup.worker.stop(30))
    await until(lambda: setup.state() is State.DRAINING)
    late = setup.submit()
    await asyncio.sleep(0)
    assert "end" not in setup.group.calls
    setup.group.finish()
    await client
    await stop
    assert setup.group.calls[3] == "end"
    assert setup.group.exit_timeout == 3
    assert setup.state() is State.STOPPED
    assert setup.devices_are_free
    assert setup.dispatcher.queued == 1
    late.cancel()
    await asyncio.gather(late, return_exceptions=True)


@pytest.mark.parametrize("why", ["its time", "its group", "a hurry"])
async def test_a_drain_ends_with_its_time_or_its_group_or_when_there_is_a_hurry(why: str) -> None:
    setup = Setup()
    await setup.start()
    client = await setup.make_busy()
    stop = asyncio.create_task(setup.worker.stop(0.01 if why == "its time" else 60.0))
    await until(lambda: setup.state() is State.DRAINING)
    if why == "its group":
        setup.group.failed.set_result(WorkerFailed("rank 1 died"))
    elif why == "a hurry":
        stop.cancel()
    async with asyncio.timeout(10):
        await asyncio.wait([stop])
    assert stop.cancelled() == (why == "a hurry")
    assert ("end" in setup.group.calls) == (why != "a hurry")
    assert setup.group.calls[-1] == "kill"
    assert setup.state() is State.STOPPED
    assert setup.devices_are_free
    with pytest.raises(WorkerFailed, match="was stopped"):
        await client


async def test_a_failed_worker_stops_and_a_stopped_one_stays_so() -> None:
    setup = Setup()
    FakeGroup.failing = {"load": WorkerFailed("no")}
    with pytest.raises(WorkerFailed):
        await setup.worker.start()
    for _ in range(2):
        await setup.worker.stop(1)
        assert setup.state() is State.STOPPED
    assert setup.devices_are_free


async def test_devices_can_be_taken_before_the_start_and_given_back_without_one() -> None:
    setup = Setup()
    setup.worker.reserve()
    assert not setup.devices_are_free
    await setup.worker.stop(1)
    assert setup.devices_are_free


async def test_batches_are_counted() -> None:
    setup = Setup()
    await setup.start()
    for count in (1, 2):
        client = await setup.make_busy()
        assert setup.worker.sent == count
        setup.group.finish()
        await client


@pytest.mark.parametrize(("number", "addresses"), [(0, range(2)), (3, range(6, 8))])
async def test_the_endpoints_follow_from_the_number(number: int, addresses: range) -> None:
    assert Setup(number).worker.addresses == addresses


async def test_the_report_shows_ranks_endpoints_devices_and_progress() -> None:
    setup = Setup(number=1)
    assert setup.worker.report().ranks == ()
    await setup.worker.start()
    report = setup.worker.report()
    assert (report.number, report.devices, report.agent_pid, report.restarts) == (1, "4,5", 4711, 0)
    assert report.ranks == (
        RankReport(0, 4712, "unix:/run/m1/worker.2", "weights of 0"),
        RankReport(1, 0, "unix:/run/m1/worker.3", "weights of 1"),
    )


@pytest.mark.parametrize(
    ("step", "what", "rank", "kind"),
    [
        ("load", What.EXCEPTION, 1, EventKind.START_FAILED),
        ("connect", What.SILENCE, 1, EventKind.START_FAILED),
        ("load", What.DEATH, 1, EventKind.RANK_DIED),
        ("load", What.DEATH, AGENT, EventKind.AGENT_DIED),
        ("load", What.PROBE, 0, EventKind.PROBE_FAILED),
        ("serve", What.DEATH, AGENT, EventKind.AGENT_DIED),
        ("serve", What.EXCEPTION, 1, EventKind.RANK_RAISED),
        ("serve", What.COLLECTIVE, 0, EventKind.RANK_RAISED),
        ("serve", What.STALL, 1, EventKind.RANK_STALLED),
        ("serve", What.SILENCE, 1, EventKind.TIMEOUT),
        ("serve", What.PROTOCOL, 1, EventKind.PROTOCOL),
    ],
)
async def test_one_fault_is_one_event_that_names_rank_and_pid(
    step: str, what: What, rank: int, kind: EventKind
) -> None:
    FakeGroup.causes = {"m/0": Cause(what, rank, 4713, "did it", 0.0)}
    setup = Setup()
    worker = setup.worker
    error = WorkerFailed("m/0: did it")
    if step != "serve":
        FakeGroup.failing = {step: error}
        with pytest.raises(WorkerFailed):
            await worker.start()
    else:
        await setup.start()
        setup.group.failed.set_result(error)
        await worker.failed()
    (event,) = setup.events.latest()
    assert (event.kind, event.worker, event.rank, event.pid, event.detail) == (kind, 0, rank, 4713, "m/0: did it")
    await worker.stop(0)


async def test_a_fault_while_it_drains_is_an_event_too() -> None:
    FakeGroup.causes = {"m/0": Cause(What.DEATH, 1, 4713, "was killed by SIGKILL", 0.0, -9)}
    setup = Setup()
    await setup.start()
    client = await setup.make_busy()
    stop = asyncio.create_task(setup.worker.stop(30))
    await until(lambda: setup.state() is State.DRAINING)
    setup.group.fail(WorkerFailed("m/0: rank 1 (pid 4713) was killed by SIGKILL"))
    await stop
    with pytest.raises(WorkerFailed):
        await client
    (event,) = setup.events.latest()
    assert (event.kind, event.rank) == (EventKind.RANK_DIED, 1)
    assert "SIGKILL" in setup.worker.report().last_error
