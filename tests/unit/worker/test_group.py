"""A rank group over real sockets and tiny real processes; the ranks' side of the protocol is spoken by the test."""

# ruff: noqa: ASYNC220, ASYNC222, ASYNC240  # short looks at processes and files, with nothing else on the loop

import asyncio
import gc
import math
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from minserve.dispatch.request import Request
from minserve.errors import (
    HandlerError,
    MinServeError,
    RankProtocolError,
    ResponseTimeout,
    WorkerFailed,
    WorkerOutOfMemory,
)
from minserve.telemetry.events import EventKind
from minserve.wire.board import STACK_SIGNAL, Slot
from minserve.wire.frames import FROM_SERVER, Frame, FrameReader, Kind
from minserve.wire.messages import (
    Answer,
    Answers,
    Failure,
    Hello,
    Load,
    Loaded,
    Metric,
    Metrics,
    Part,
    Progress,
    RequestMeta,
    Shutdown,
    pack,
    pack_with_body,
    unpack,
)
from minserve.worker import inquest, launcher
from minserve.worker.blame import DEATH_GATHER_S
from minserve.worker.devices import Devices
from minserve.worker.group import RankGroup
from minserve.worker.launcher import Launch
from minserve.worker.starter import Starter
from tests.unit.worker.agents import torchrun_says
from tests.unit.worker.specs import make_spec, model_config, until

pytestmark = pytest.mark.asyncio

Process = subprocess.Popen[bytes]
# A rank has a handler for the signal that asks for its stack; without one it would end of it.
LIVES = ("env", f"--ignore-signal={int(STACK_SIGNAL)}", "sleep", "600")


class FakeRank:
    """A process that does nothing, and a connection that says in its name what the test tells it to."""

    def __init__(self, rank: int, process: Process | None, pid: int) -> None:
        self.rank = rank
        self.process = process
        self.pid = pid
        self.socket: socket.socket | None = None
        self._reader = FrameReader(2**31, FROM_SERVER)
        self._frames: list[Frame] = []

    async def connect(self, launch: dict[str, str], world_size: int) -> None:
        path = f"{launch['MINSERVE_ENDPOINT']}{int(launch['MINSERVE_BASE']) + self.rank}".removeprefix("unix:")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        await asyncio.get_running_loop().sock_connect(self.socket, path)
        hello = Hello(self.rank, self.rank, world_size, self.pid, launch["MINSERVE_WORKER"], launch["MINSERVE_SECRET"])
        await self.send(pack(Kind.HELLO, hello))
        self._slot = Slot(Path(launch["MINSERVE_DIRECTORY"]) / "board", self.rank)

    def begin(self, seq: int) -> None:
        """Shows that it has taken up a batch."""
        self._slot.received(seq)

    async def send(self, data: bytes) -> None:
        assert self.socket is not None
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def receive(self, kind: Kind) -> Frame:
        assert self.socket is not None
        async with asyncio.timeout(10):
            while not self._frames:
                count = await asyncio.get_running_loop().sock_recv_into(self.socket, self._reader.buffer())
                assert count, "the server has hung up"
                self._frames += [frame for frame in self._reader.received(count) if frame.kind is not Kind.MEMORY]
        frame = self._frames.pop(0)
        assert frame.kind is kind
        return frame

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()


class Setup:
    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.processes: list[Process] = []
        self.ranks: list[FakeRank] = []
        self.launch: dict[str, str] = {}
        self.agent: tuple[str, ...] = LIVES
        self.freed = 0
        self.unbegun: list[Request] = []
        self.events: list[EventKind] = []
        self._plan = launcher.plan
        monkeypatch.setattr(launcher, "plan", self._planned)

    def _planned(self, *arguments: object) -> Launch:
        plan = self._plan(*arguments)  # type: ignore[arg-type]
        self.launch = dict(plan.added)
        return Launch(self.agent, {}, self.directory)

    def group(self, ranks: int = 2, **options: object) -> RankGroup:
        response_timeout = options.pop("response_timeout", 10.0)
        config = model_config("tp" if ranks > 1 else "", options, response_timeout=response_timeout)
        spec = make_spec(ranks, model_dir=self.directory, config=config)
        object.__setattr__(spec, "response_timeout", response_timeout)
        self._group = RankGroup(
            *(spec, "m/0", 0, self.directory, Devices(), Starter({"PATH": os.environ["PATH"]}, self.directory)),
            *(self._free, self._lose, lambda kind, detail, rank, pid: self.events.append(kind)),
        )
        self.world_size = ranks
        return self._group

    def _free(self) -> None:
        self.freed += 1

    def _lose(self, requests: list[Request], error: MinServeError, begun: bool) -> None:
        if not begun:
            self.unbegun += requests
            return
        for request in requests:
            request.fail(error)

    async def arrive(self, *ranks: int) -> None:
        for rank in ranks:
            process = None
            if self.world_size > 1:
                process = subprocess.Popen(LIVES, start_new_session=True)
                self.processes.append(process)
            fake = FakeRank(rank, process, process.pid if process else self._group.agent_pid)
            self.ranks.append(fake)
            await fake.connect(self.launch, self.world_size)

    async def connected(self, ranks: int = 2, **options: object) -> RankGroup:
        group = self.group(ranks, **options)
        await group.launch()
        connect = asyncio.create_task(group.connect(10))
        await self.arrive(*range(ranks))
        await connect
        return group

    async def serving(self, ranks: int = 2, **options: object) -> RankGroup:
        group = await self.connected(ranks, **options)
        load = asyncio.create_task(group.load(10))
        for rank in self.ranks:
            await rank.receive(Kind.LOAD)
            await rank.send(pack(Kind.LOADED, Loaded(0.1)))
        await load
        return group

    async def submit(self, group: RankGroup, *, begin: bool = True) -> Request:
        """Sends a batch of one request; every rank begins with it, or it stays in their sockets."""
        body = b"question"
        meta = RequestMeta("id", (), (Part("body", "", len(body)),))
        request = Request(meta, [body], math.inf, asyncio.get_running_loop().create_future())
        group.send([request])
        for rank in self.ranks if begin else ():
            frame = await rank.receive(Kind.BATCH)
            assert bytes(frame.body) == body
            rank.begin(frame.seq)
        return request


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("g")  # short: a unix address has 107 bytes


@pytest_asyncio.fixture
async def setup(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Setup]:
    setup = Setup(directory, monkeypatch)
    yield setup
    await setup._group.kill()
    for rank in setup.ranks:
        rank.close()
    for process in setup.processes:
        process.kill()
        process.wait()
    assert list(directory.iterdir()) == [], "nothing is left behind"


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """What a group leaves open is a ResourceWarning, and so a failure, here and not in some later test."""
    yield
    gc.collect()


async def error_of(group: RankGroup) -> WorkerFailed:
    async with asyncio.timeout(10):
        return await asyncio.shield(group.failed)


def failure(kind: str, rank: int) -> Failure:
    return Failure(kind, "ValueError", "no weights", "handler.py:3", "Traceback ...", rank, (0, 1))


# ── start ──


async def test_a_group_loads_serves_and_ends(setup: Setup) -> None:
    group = await setup.connected(exit_timeout=10.0)
    load = asyncio.create_task(group.load(10))
    for rank in setup.ranks:
        message = unpack(Load, (await rank.receive(Kind.LOAD)).meta)
        assert (message.model, message.handler, message.batch_size, message.gpu) == ("m", "handler.py", 1, False)
        await rank.send(pack(Kind.PROGRESS, Progress("weights", rank.rank, 9)))
    one, two = setup.ranks
    await two.send(pack(Kind.LOADED, Loaded(0.5)))
    await until(lambda: group.stage(1) == "loaded")
    assert group.stage(0) == "weights 0 of 9"
    assert not load.done(), "every rank must have loaded"
    await one.send(pack(Kind.LOADED, Loaded(0.5)))
    await load
    assert group.pids == {0: one.pid, 1: two.pid}

    request = await setup.submit(group)
    assert group.busy
    await one.send(b"".join(map(bytes, pack_with_body(Kind.REPLY, Answers((Answer(0, 2),)), [b"ok"], 1))))
    assert bytes((await request.reply).body) == b"ok"
    assert setup.freed == 1

    end = asyncio.create_task(group.end(10))
    for rank in setup.ranks:
        assert unpack(Shutdown, (await rank.receive(Kind.SHUTDOWN)).meta).reason
        assert rank.process is not None
        rank.process.terminate()  # what a rank does by itself
    async with asyncio.timeout(5):
        await end
    assert not group.failed.done(), "a rank that goes when it is asked to has not failed"


async def test_ranks_that_do_not_go_when_asked_are_killed(setup: Setup) -> None:
    group = await setup.serving()
    await group.end(0.05)
    for process in setup.processes:
        assert process.wait(10) == -signal.SIGKILL


async def test_a_missing_rank_is_named(setup: Setup) -> None:
    group = setup.group(3)
    setup.agent = ("sh", "-c", "echo rank 1: no module named torch >&2; exec sleep 600")
    await group.launch()
    connect = asyncio.create_task(group.connect(0.3))
    await setup.arrive(2)
    with pytest.raises(WorkerFailed) as caught:
        await connect
    assert str(caught.value) == "m/0: rank 0, 1 did not connect within 0.3 s"
    assert group.cause is not None
    assert group.cause.rank == 0
    assert caught.value.last_lines == ("rank 1: no module named torch",)


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (("sh", "-c", "echo bad option; exit 2"), "exited with code 2"),
        (("sh", "-c", "echo bad option; kill -9 $$"), "was killed by SIGKILL"),
    ],
)
async def test_an_agent_that_dies_ends_the_wait_for_the_ranks(
    setup: Setup, agent: tuple[str, ...], message: str
) -> None:
    setup.agent = agent
    group = setup.group()
    await group.launch()
    with pytest.raises(WorkerFailed) as caught:
        await group.connect(30)
    assert str(caught.value) == f"m/0: torchrun (pid {group.agent_pid}) {message}"
    assert caught.value.last_lines == ("bad option",)


async def test_a_rank_that_ends_before_it_connects_is_named_with_its_lines(setup: Setup, tmp_path: Path) -> None:
    said = tmp_path / "said"
    said.write_text("no libcuda.so for me\n" + torchrun_says({1: 7, 0: -15}, first=1))
    setup.agent = ("sh", "-c", f"cat {said}; exit 1")
    group = setup.group()
    await group.launch()
    with pytest.raises(WorkerFailed) as caught:
        await group.connect(30)
    assert str(caught.value) == "m/0: rank 1 (pid 1001) exited with code 7"
    assert caught.value.last_lines[0] == "no libcuda.so for me"
    assert len(caught.value.last_lines) == 2


async def test_a_rank_that_torchrun_terminates_before_all_have_come_is_not_blamed(setup: Setup, tmp_path: Path) -> None:
    said, go = tmp_path / "said", tmp_path / "go"
    said.write_text(torchrun_says({0: 7, 1: -15}, first=0))
    os.mkfifo(go)
    setup.agent = ("sh", "-c", f"read line < {go}; sleep {3 * DEATH_GATHER_S}; cat {said}; exit 1")
    group = setup.group()
    await group.launch()
    connect = asyncio.create_task(group.connect(30))
    await setup.arrive(1)
    await until(lambda: group.pids)
    os.kill(setup.ranks[0].pid, signal.SIGTERM)
    await until(lambda: group.suspected)
    go.write_text("go\n")
    with pytest.raises(WorkerFailed, match=r"^m/0: rank 0 \(pid 1000\) exited with code 7$"):
        await connect


async def test_of_ranks_that_end_by_sigterm_the_one_is_blamed_that_torchrun_has_seen_first(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gather in ("SIGTERM_GATHER_S", "SOCKET_GATHER_S"):
        monkeypatch.setattr(inquest, gather, 30.0)
    said, go = tmp_path / "said", tmp_path / "go"
    os.mkfifo(go)
    setup.agent = ("sh", "-c", f"read line < {go}; cat {said}; exit 1")
    group = await setup.serving()
    pids = dict(group.pids)
    said.write_text(torchrun_says({0: -15, 1: -15}, first=1).replace("pid: 1001", f"pid: {pids[1]}"))
    for rank in (0, 1):  # the sibling is seen to end before the one that was struck
        os.kill(pids[rank], signal.SIGTERM)
        await until(lambda: group.suspected)
    go.write_text("go\n")
    assert str(await error_of(group)) == f"m/0: rank 1 (pid {pids[1]}) was killed by SIGTERM"


@pytest.mark.parametrize("agent", [("/nonexistent/python",), ("sh",)])
async def test_a_process_that_cannot_be_started_is_a_failed_start_that_leaves_nothing_open(
    setup: Setup, agent: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.agent = agent
    group = setup.group()
    if agent == ("sh",):

        def fails(*arguments: object) -> None:
            raise OSError(12, "Cannot allocate memory")

        monkeypatch.setattr(launcher, "spawn", fails)
    with pytest.raises(WorkerFailed, match=f"m/0: cannot start {agent[0]}: "):
        await group.launch()


async def test_ranks_that_come_just_as_the_group_fails_are_let_go(setup: Setup) -> None:
    """The death is seen in the same turn of the loop as the last HELLO."""
    group = setup.group(1)
    await group.launch()
    connect = asyncio.create_task(group.connect(10))
    await setup.arrive(0)
    await until(lambda: group.pids)
    if not group.failed.done():
        group.failed.set_result(WorkerFailed("torchrun has died"))
    if not connect.done():
        with pytest.raises(WorkerFailed, match="torchrun has died"):
            await connect
    else:
        await connect


# ── load ──


async def test_one_rank_that_cannot_load_fails_the_group_at_once(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    group = await setup.connected()
    load = asyncio.create_task(group.load(30))
    await setup.ranks[1].send(pack(Kind.FAILED, failure("own", 1)))
    with pytest.raises(WorkerFailed) as caught:
        await load
    assert str(caught.value) == f"m/0: rank 1 (pid {setup.ranks[1].pid}) cannot load: ValueError: no weights"
    assert "Traceback ..." in caplog.text
    assert "at handler.py:3" in caplog.text


async def test_a_collectives_error_waits_for_the_cause(setup: Setup) -> None:
    group = await setup.connected()
    load = asyncio.create_task(group.load(30))
    await setup.ranks[0].send(pack(Kind.FAILED, failure("collective", 0)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not load.done()
    await setup.ranks[1].send(pack(Kind.FAILED, failure("own", 1)))
    with pytest.raises(WorkerFailed, match="rank 1"):
        await load


async def test_a_load_that_takes_too_long_says_how_far_each_rank_is(setup: Setup) -> None:
    group = await setup.connected(3)
    load = asyncio.create_task(group.load(0.3))
    one, two, _ = setup.ranks
    await one.send(pack(Kind.LOADED, Loaded(0.1)))
    await two.send(pack(Kind.PROGRESS, Progress("weights", 3, 9)))
    with pytest.raises(WorkerFailed) as caught:
        await load
    assert group.cause is not None
    assert (group.cause.rank, group.cause.pid) == (1, setup.ranks[1].pid)
    behind = [f"rank {rank.rank} (pid {rank.pid})" for rank in setup.ranks]
    assert str(caught.value) == f"m/0: not loaded within 20 s ({behind[1]}: weights 3 of 9, {behind[2]}: importing)"


async def test_the_ranks_say_how_many_batches_they_can_have_at_work(setup: Setup) -> None:
    group = await setup.connected()
    load = asyncio.create_task(group.load(30))
    for rank, places in zip(setup.ranks, (3, 2), strict=True):
        assert unpack(Load, (await rank.receive(Kind.LOAD)).meta).in_flight == 0
        await rank.send(pack(Kind.LOADED, Loaded(0.1, in_flight=places)))
    await load
    for place in (True, True, False):
        assert group.has_place() == place
        if place:
            await setup.submit(group)


async def test_what_a_handler_records_counts_also_while_it_loads(setup: Setup) -> None:
    group = await setup.connected()
    load = asyncio.create_task(group.load(30))
    labels = (("ModelName", "m"), ("Level", "Model"))
    for rank in setup.ranks:
        metric = Metric("HandlerTime", 1.5 + rank.rank, "ms", "gauge", labels, "", 0.0)
        await rank.send(pack(Kind.METRICS, Metrics((metric,))))
        await rank.send(pack(Kind.LOADED, Loaded(0.1)))
    await load
    lines = group._meters._metrics.text().splitlines()
    assert [line.rpartition(" ")[2] for line in lines if line.startswith("HandlerTime{")] == ["1.5", "2.5"]
    assert 'Level="Model",Rank="1",' in next(line for line in lines if line.endswith(" 2.5"))


async def test_a_reply_before_the_load_is_over_breaks_the_protocol(setup: Setup) -> None:
    group = await setup.connected()
    load = asyncio.create_task(group.load(30))
    await setup.ranks[0].send(pack(Kind.REPLY, Answers(()), 1))
    with pytest.raises(RankProtocolError, match=r"rank 0 .* broke the protocol: REPLY before every rank has loaded"):
        await load


# ── failure in flight ──


async def test_a_rank_that_is_killed_fails_the_request_with_its_name(setup: Setup) -> None:
    group = await setup.serving()
    request = await setup.submit(group)
    rank = setup.ranks[1]
    assert rank.process is not None
    rank.process.kill()
    error = await error_of(group)
    assert str(error) == f"m/0: rank 1 (pid {rank.pid}) was killed by SIGKILL"
    assert request.reply.exception() is error
    assert not group.has_place()


@pytest.mark.parametrize("ranks", [1, 2])
async def test_a_socket_that_closes_a_moment_before_the_exit_is_the_same_death(setup: Setup, ranks: int) -> None:
    """The kernel closes a dying process's files first; only its exit tells what happened."""
    setup.agent = ("sleep", "600")
    group = await setup.serving(ranks)
    request = await setup.submit(group)
    rank = setup.ranks[-1]
    rank.close()
    await until(lambda: group.suspected)
    os.kill(rank.pid, signal.SIGSEGV)
    error = await error_of(group)
    assert str(error) == f"m/0: rank {rank.rank} (pid {rank.pid}) was killed by SIGSEGV"
    assert request.reply.exception() is error


async def test_a_socket_that_closes_without_an_exit_is_a_death_all_the_same(setup: Setup) -> None:
    group = await setup.serving()
    setup.ranks[1].close()
    assert str(await error_of(group)) == f"m/0: rank 1 (pid {setup.ranks[1].pid}) closed its socket"


async def test_siblings_that_torchrun_terminates_are_not_blamed(setup: Setup) -> None:
    group = await setup.serving(3)
    for rank, number in ((0, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGABRT)):
        process = setup.ranks[rank].process
        assert process is not None
        process.send_signal(number)
    assert str(await error_of(group)) == f"m/0: rank 1 (pid {setup.ranks[1].pid}) was killed by SIGABRT"


async def test_exit_code_137_is_out_of_memory(setup: Setup) -> None:
    """So a shell tells of a child that the kernel's out-of-memory killer has ended."""
    setup.agent = ("sh", "-c", "sleep 600 & wait; exit 137")
    group = await setup.serving(1)
    request = await setup.submit(group)
    children = Path(f"/proc/{group.agent_pid}/task/{group.agent_pid}/children")
    await until(children.read_text)
    os.kill(int(children.read_text()), signal.SIGTERM)
    error = await error_of(group)
    assert type(error) is WorkerOutOfMemory
    assert request.reply.exception() is error


async def test_rubbish_from_a_rank_is_its_fault_whatever_comes_after(setup: Setup) -> None:
    group = await setup.serving()
    request = await setup.submit(group)
    await setup.ranks[1].send(b"Hello, I print to the wrong file descriptor")
    error = await error_of(group)
    assert type(error) is RankProtocolError
    assert "rank 1" in str(error)
    assert "broke the protocol: not a minserve frame" in str(error)
    assert request.reply.exception() is error


async def test_an_exception_on_one_rank_fails_the_group_and_names_it(setup: Setup) -> None:
    group = await setup.serving(error_grace=0.05)
    request = await setup.submit(group)
    await setup.ranks[1].send(pack(Kind.ERROR, failure("own", 1), 1))
    error = await error_of(group)
    assert str(error) == f"m/0: rank 1 (pid {setup.ranks[1].pid}) raised ValueError: no weights"
    assert request.reply.exception() is error


async def test_a_death_explains_another_ranks_collective_error(setup: Setup) -> None:
    group = await setup.serving(error_grace=30.0)
    request = await setup.submit(group)
    await setup.ranks[0].send(pack(Kind.ERROR, failure("collective", 0), 1))
    process = setup.ranks[1].process
    assert process is not None
    process.kill()
    assert "rank 1" in str(await error_of(group))
    assert isinstance(request.reply.exception(), WorkerFailed)


async def test_an_exception_in_step_leaves_the_group_alone(setup: Setup) -> None:
    group = await setup.serving()
    request = await setup.submit(group)
    for rank in setup.ranks:
        await rank.send(pack(Kind.ERROR, failure("own", rank.rank), 1))
    for rank in setup.ranks:
        assert (await rank.receive(Kind.CONTINUE)).seq == 1
    assert isinstance(request.reply.exception(), HandlerError)
    assert group.has_place()
    assert not group.failed.done()


async def test_a_batch_without_an_answer_is_a_response_timeout(setup: Setup) -> None:
    group = await setup.serving(first_batch_timeout=0.05)
    request = await setup.submit(group)
    error = await error_of(group)
    assert type(error) is ResponseTimeout
    assert "did not finish batch 1 within 0.05 s" in str(error)
    assert request.reply.exception() is error


async def test_a_kill_answers_what_is_in_flight_and_leaves_no_process(setup: Setup) -> None:
    group = await setup.serving()
    request = await setup.submit(group)
    await group.kill()
    await group.kill()
    assert "the worker was stopped" in str(request.reply.exception())
    assert [process.wait(10) for process in setup.processes] == [-signal.SIGKILL] * 2
    assert not Path(f"/proc/{group.agent_pid}").exists()


@pytest.mark.parametrize("dies", [True, False])
async def test_batches_that_no_rank_had_begun_go_back_when_no_rank_can_begin_them_any_more(
    setup: Setup, dies: bool
) -> None:
    group = await setup.serving(in_flight=3)
    one, two, three = [await setup.submit(group, begin=number == 0) for number in range(3)]
    if dies:
        setup.processes[1].kill()
        await error_of(group)
        assert isinstance(one.reply.exception(), WorkerFailed)
        assert setup.unbegun == []
    setup.ranks[0].begin(2)  # a rank lives, and takes up the next one before it is killed
    await group.kill()
    assert one.reply.done()
    assert two.reply.done()
    assert setup.unbegun == [three]


async def test_what_a_rank_prints_last_goes_with_the_error(setup: Setup) -> None:
    group = await setup.serving()
    process = setup.ranks[1].process
    assert process is not None
    process.send_signal(signal.SIGSEGV)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    # Its words become readable behind its death, in the same turn of the loop.
    fifo = os.open(f"{setup.launch['MINSERVE_DIRECTORY']}/output.1", os.O_WRONLY)
    os.write(fifo, b"loading\nSegmentation fault\n")
    os.close(fifo)
    assert (await error_of(group)).last_lines == ("loading", "Segmentation fault")
