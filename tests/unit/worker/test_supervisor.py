import asyncio
import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from minserve.dispatch.dispatcher import Dispatcher
from minserve.dispatch.request import Reply, Request
from minserve.errors import Draining, ModelUnhealthy, WorkerFailed
from minserve.wire.messages import RequestMeta
from minserve.worker.devices import DeviceAllocator, Inventory
from minserve.worker.spec import ModelSpec
from minserve.worker.supervisor import RetryWindow, Supervisor
from tests.fakes import FakeClock
from tests.unit.worker.specs import make_spec, model_config, until

STEPS = (0.0, 1.0, 2.0, 3.0)


class TestRetryWindow:
    def test_the_steps_follow_each_other_and_the_last_repeats(self) -> None:
        window = RetryWindow(FakeClock(), STEPS, window=300, stable=60, most=None)
        assert [window.failed(served=False) for _ in range(6)] == [0, 1, 2, 3, 3, 3]

    def test_restarts_end_with_the_window_that_the_first_failure_opened(self) -> None:
        clock = FakeClock()
        clock.advance(1000)
        window = RetryWindow(clock, (5.0,), window=12, stable=60, most=None)
        assert window.failed(served=False) == 5
        clock.advance(6)
        assert window.failed(served=False) == 5
        clock.advance(4)
        assert window.failed(served=False) == 2, "the last restart comes at the window's end, not behind it"
        clock.advance(2)
        assert window.failed(served=False) is None

    def test_a_worker_that_was_ready_long_enough_begins_anew(self) -> None:
        clock = FakeClock()
        window = RetryWindow(clock, STEPS, window=100, stable=60, most=None)
        assert [window.failed(served=False), window.failed(served=False)] == [0, 1]
        clock.advance(50)
        window.ready()
        clock.advance(60)
        assert [window.failed(served=False), window.failed(served=False)] == [0, 1]

    def test_a_worker_that_was_ready_too_briefly_does_not(self) -> None:
        clock = FakeClock()
        window = RetryWindow(clock, STEPS, window=100, stable=60, most=None)
        assert window.failed(served=False) == 0
        for delay in (1, 2):  # crashes soon after each start: the same trouble goes on
            window.ready()
            clock.advance(49)
            assert window.failed(served=False) == delay
        clock.advance(2)
        assert window.failed(served=False) is None

    def test_time_in_start_does_not_count_as_ready(self) -> None:
        clock = FakeClock()
        window = RetryWindow(clock, STEPS, window=1000, stable=60, most=None)
        window.ready()
        clock.advance(60)
        assert window.failed(served=False) == 0
        clock.advance(60)
        assert window.failed(served=False) == 1

    def test_a_worker_that_serves_between_failures_is_restarted_for_ever_but_ever_later(self) -> None:
        clock = FakeClock()
        window = RetryWindow(clock, STEPS, window=30, stable=60, most=1)
        for delay in (0, 1, 2, 3, 3, 3):
            window.ready()
            clock.advance(20)
            assert window.failed(served=True) == delay
        assert window.failed(served=False) is None, "one that only loads is not worth more restarts"

    @pytest.mark.parametrize(("most", "delays"), [(0, [None]), (2, [0, 1, None, None])])
    def test_the_number_of_restarts_is_bounded(self, most: int, delays: list[float | None]) -> None:
        window = RetryWindow(FakeClock(), STEPS, window=300, stable=60, most=most)
        assert [window.failed(served=False) for _ in delays] == delays

    def test_a_new_window_has_all_its_restarts(self) -> None:
        clock = FakeClock()
        window = RetryWindow(clock, STEPS, window=300, stable=60, most=1)
        for _ in range(3):
            assert window.failed(served=False) == 0
            window.ready()
            clock.advance(60)

    def test_a_window_of_nothing_allows_no_restart(self) -> None:
        assert RetryWindow(FakeClock(), STEPS, window=0, stable=60, most=None).failed(served=False) is None


class FakeWorker:
    """Fails and hangs as it is told: a string is an error, "ready" a start that succeeds."""

    made: ClassVar[list["FakeWorker"]] = []
    script: ClassVar[dict[int, list[str | Exception]]] = {}

    def __init__(
        self,
        spec: ModelSpec,
        number: int,
        directory: Path,
        dispatcher: Dispatcher,
        devices: DeviceAllocator,
        environ: Mapping[str, str],
    ) -> None:
        self.number = number
        self.who = f"m/{number}"
        self.starts = self.ready = 0
        self.served = self.given_up = False
        self.stopped: list[float] = []
        self.end: asyncio.Future[WorkerFailed] = asyncio.get_running_loop().create_future()
        FakeWorker.made.append(self)

    async def start(self) -> None:
        self.starts += 1
        outcome = self.script.get(self.number, ["ready"]).pop(0)
        if outcome == "hang":
            await asyncio.Event().wait()
        if isinstance(outcome, Exception):
            raise outcome
        if outcome != "ready":
            raise WorkerFailed(outcome)
        self.end = asyncio.get_running_loop().create_future()
        self.ready = self.starts

    async def failed(self) -> WorkerFailed:
        return await self.end

    async def fail_when_ready(self, start: int, *, served: bool = False) -> None:
        await until(lambda: self.ready == start)
        self.served = served
        self.end.set_result(WorkerFailed("rank 1 died"))

    async def stop(self, drain_timeout: float) -> None:
        self.stopped.append(drain_timeout)

    def give_up(self) -> None:
        self.given_up = True


class Setup:
    def __init__(
        self,
        count: int = 1,
        window: float = 300.0,
        backoff: tuple[float, ...] = (0.0,),
        most: int | None = None,
    ) -> None:
        config = model_config(
            "",
            {"backoff": backoff},
            {"max_restarts": most} if most is not None else {},
            max_retry_timeout_in_sec=window,
        )
        self.dispatcher = Dispatcher(asyncio.get_running_loop(), "m", 1, 0.0, 10)
        self.changes = 0
        self.supervisor = Supervisor(
            *(make_spec(config=config), count, Path("/run"), self.dispatcher, DeviceAllocator(Inventory()), {}),
            self._changed,
        )
        self.supervisor.start()

    def gave_up(self) -> bool:
        return self.supervisor.unhealthy is not None

    def _changed(self) -> None:
        self.changes += 1

    def submit(self) -> asyncio.Task[Reply]:
        loop = asyncio.get_running_loop()
        request = Request(RequestMeta("", (), ()), [], math.inf, loop.create_future())
        return asyncio.create_task(self.dispatcher.submit(request))


@pytest.fixture(autouse=True)
def fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.worker.supervisor.Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "made", [])
    monkeypatch.setattr(FakeWorker, "script", {})


@pytest.mark.asyncio
class TestSupervisor:
    async def test_a_model_that_has_given_up_refuses_at_once_and_answers_what_waits(self) -> None:
        FakeWorker.script = {0: ["no weights", "no weights", "still none"]}
        setup = Setup(most=2)
        waiting = setup.submit()
        await until(lambda: setup.supervisor.unhealthy)
        for client in (waiting, setup.submit()):
            with pytest.raises(ModelUnhealthy, match='Model "m" is unhealthy: still none'):
                await client
        assert FakeWorker.made[0].starts == 3
        assert str(setup.supervisor.unhealthy) == "still none"
        assert setup.changes >= 3
        await setup.supervisor.stop(1)

    async def test_a_worker_that_fails_when_ready_is_started_again(self) -> None:
        FakeWorker.script = {0: ["ready", "ready", "hang"]}
        setup = Setup()
        (worker,) = FakeWorker.made
        await worker.fail_when_ready(1)
        await worker.fail_when_ready(2)
        await until(lambda: worker.starts == 3)
        assert setup.supervisor.unhealthy is None
        await setup.supervisor.stop(1)

    async def test_restarts_count_anew_once_a_worker_has_served(self) -> None:
        FakeWorker.script = {0: ["ready", "ready", "ready", "ready"]}
        setup = Setup(most=1)
        (worker,) = FakeWorker.made
        await worker.fail_when_ready(1, served=True)
        await worker.fail_when_ready(2, served=True)
        await worker.fail_when_ready(3, served=False)
        await until(lambda: setup.supervisor.unhealthy)
        assert worker.starts == 3
        await setup.supervisor.stop(1)

    async def test_while_one_worker_may_serve_the_model_is_not_unhealthy(self) -> None:
        FakeWorker.script = {0: ["no"], 1: ["ready", "no, too"]}
        setup = Setup(count=2, window=0)
        first, second = FakeWorker.made
        await until(lambda: setup.supervisor._given_up)
        assert not setup.gave_up()
        client = setup.submit()
        await asyncio.sleep(0)
        assert setup.dispatcher.queued == 1
        await second.fail_when_ready(1)
        with pytest.raises(ModelUnhealthy, match="rank 1 died"):
            await client
        assert setup.gave_up()
        assert (first.starts, second.starts) == (1, 1)
        await setup.supervisor.stop(1)

    async def test_what_nobody_foresaw_counts_as_a_failure_of_the_worker(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        FakeWorker.script = {0: [OSError("too many open files"), "ready"]}
        setup = Setup()
        await until(lambda: FakeWorker.made[0].starts == 2)
        assert "m/0: unforeseen" in caplog.text
        assert "too many open files" in caplog.text
        await setup.supervisor.stop(1)

    @pytest.mark.parametrize("script", [["ready"], ["hang"], ["fails, then waits an hour"]])
    async def test_a_stop_is_obeyed_in_every_state_and_answers_what_waits(self, script: list[str | Exception]) -> None:
        FakeWorker.script = {0: script}
        setup = Setup(backoff=(3600.0,), window=7200.0)
        waiting = setup.submit()
        await until(lambda: FakeWorker.made[0].starts and setup.dispatcher.queued)
        async with asyncio.timeout(10):
            await setup.supervisor.stop(7.5)
        assert FakeWorker.made[0].stopped == [7.5]
        for client in (waiting, setup.submit()):
            with pytest.raises(Draining, match="shutting down"):
                await client
        assert FakeWorker.made[0].starts == 1

    async def test_a_stop_refuses_before_it_drains(self) -> None:
        setup = Setup()
        await until(lambda: FakeWorker.made[0].starts)
        drained = asyncio.Event()

        async def drain(drain_timeout: float) -> None:
            await drained.wait()

        FakeWorker.made[0].stop = drain  # type: ignore[method-assign]
        waiting = setup.submit()
        stop = asyncio.create_task(setup.supervisor.stop(30))
        for client in (waiting, setup.submit()):
            with pytest.raises(Draining):
                await client
        assert not stop.done()
        drained.set()
        await stop
