import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from minserve.dispatch.request import Request
from minserve.errors import HandlerError, MinServeError, WorkerFailed
from minserve.playlist import Batch
from minserve.recording import RecordingError
from minserve.replay import Replay, with_ranks
from minserve.wire.messages import Answer, Part, RequestMeta
from minserve.wire.recording import Sent
from minserve.worker.devices import Devices, Inventory
from minserve.worker.spec import ModelSpec
from tests.unit.worker.specs import make_spec, model_config, until


class FakeGroup:
    """A rank group that a test answers for."""

    made: ClassVar[list["FakeGroup"]] = []
    start_error: ClassVar[MinServeError | None] = None

    def __init__(
        self,
        spec: ModelSpec,
        who: str,
        slot: int,
        directory: Path,
        devices: Devices,
        environ: Mapping[str, str],
        on_free: Callable[[], None],
        on_lost: Callable[[list[Request], MinServeError, bool], None],
        on_event: object,
    ) -> None:
        self.who = who
        self.directory = directory
        self.calls: list[str] = []
        self.batches: list[list[Request]] = []
        self.busy = False
        self.through = True
        self.failed: asyncio.Future[WorkerFailed] = asyncio.get_running_loop().create_future()
        self._on_free = on_free
        self._on_lost = on_lost
        FakeGroup.made.append(self)

    async def launch(self) -> None:
        assert self.directory.is_dir()
        self.calls.append("launch")

    async def connect(self, timeout: float) -> None:
        self.calls.append("connect")

    async def load(self, timeout: float) -> None:
        if self.start_error is not None:
            raise self.start_error
        self.calls.append("load")

    def has_place(self, *, full: bool) -> bool:
        assert not full, "a batch that is sent ahead of its turn cannot be timed"
        return not self.busy and not self.failed.done()

    def send(self, requests: list[Request]) -> None:
        assert self.has_place(full=False)
        self.busy = True
        self.batches.append(requests)

    async def end(self, timeout: float) -> None:
        self.calls.append("end")

    async def kill(self) -> None:
        self.calls.append("kill")

    # ── what the ranks do ──

    def answer(self) -> None:
        for request in self.batches[-1]:
            body = b"".join(map(bytes, request.bodies))
            request.answer(Answer(0, len(body)), body)
        self.free()

    def free(self) -> None:
        self.busy = False
        self._on_free()

    def raise_(self) -> None:
        self._on_lost(self.batches[-1], HandlerError("m/0, rank 0: boom"), True)
        self.free()

    def die(self, in_flight: bool = True) -> None:
        error = WorkerFailed("m/0: rank 1 (pid 4711) was killed by SIGSEGV")
        self.failed.set_result(error)
        if in_flight:
            self._on_lost(self.batches[-1], error, True)


class Rig:
    """A replay of batches of one, two, three ... requests."""

    def __init__(self, short_path: Path, errors: list[str | None]) -> None:
        self.said: list[str] = []
        self.replay = Replay(
            make_spec(2), Inventory(), {"MINSERVE_RUNTIME_DIR": str(short_path)}, lambda line: self.said.append(line)
        )
        meta = RequestMeta("id", (), (Part("body", "", 2),))
        batches = [
            Batch(Sent("m-0-a", seq, 1.0, (meta,) * seq, (b"%02d" % seq,) * seq), 0, error)
            for seq, error in enumerate(errors, 1)
        ]
        self.run = asyncio.create_task(self.replay.run(batches))

    @property
    def group(self) -> FakeGroup:
        return FakeGroup.made[-1]

    async def sent(self, count: int) -> None:
        await until(lambda: FakeGroup.made and len(self.group.batches) == count)

    def told(self) -> list[str]:
        """The lines without their times."""
        return [line.replace(line[line.rindex(", ") : line.rindex(" s") + 2], "") for line in self.said]


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sockets' addresses have 107 bytes."""
    return tmp_path_factory.mktemp("r")


@pytest.fixture(autouse=True)
def fake_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.replay.RankGroup", FakeGroup)
    monkeypatch.setattr(FakeGroup, "made", [])
    monkeypatch.setattr(FakeGroup, "start_error", None)


@pytest.mark.asyncio
async def test_batches_go_one_after_the_other_as_they_were_composed(short_path: Path) -> None:
    rig = Rig(short_path, ["", "", ""])
    for count in (1, 2, 3):
        await rig.sent(count)
        assert [request.bodies for request in rig.group.batches[-1]] == [[b"%02d" % count]] * count
        await asyncio.sleep(0)
        assert len(rig.group.batches) == count
        rig.group.answer()
    await rig.run
    assert rig.told() == ["batch 1: 1 request, ok", "batch 2: 2 requests, ok", "batch 3: 3 requests, ok"]
    assert (rig.replay.failed, rig.replay.death, rig.replay.sent) == ([], None, 3)
    assert rig.group.calls == ["launch", "connect", "load", "end", "kill"]
    assert os.listdir(short_path) == []


@pytest.mark.asyncio
async def test_an_exception_in_step_is_told_and_the_rest_is_played(short_path: Path) -> None:
    rig = Rig(short_path, ["", "", "told otherwise"])
    await rig.sent(1)
    rig.group.answer()
    await rig.sent(2)
    rig.group.raise_()
    await rig.sent(3)
    rig.group.answer()
    await rig.run
    assert rig.replay.failed == [2]
    assert "batch 2: 2 requests, m/0, rank 0: boom, " in rig.said[1]
    assert rig.said[1].endswith("; recorded: ok")
    assert rig.said[2].endswith("; recorded: told otherwise")


@pytest.mark.asyncio
async def test_a_death_ends_the_replay_and_names_the_batch(short_path: Path) -> None:
    rig = Rig(short_path, ["", "m/0: rank 1 died", None])
    await rig.sent(1)
    rig.group.answer()
    await rig.sent(2)
    rig.group.die()
    await rig.run
    assert rig.replay.failed == [2]
    assert rig.replay.sent == 2
    assert str(rig.replay.death) == "m/0: rank 1 (pid 4711) was killed by SIGSEGV"
    assert "recorded" not in rig.said[1]  # it failed then, too
    assert rig.group.calls[-1] == "kill"


@pytest.mark.asyncio
async def test_a_rank_that_dies_after_the_last_answer_is_found(short_path: Path) -> None:
    rig = Rig(short_path, [None])
    await rig.sent(1)
    rig.group.through = False
    rig.group.answer()
    await until(lambda: rig.said)
    assert rig.said[0].endswith("; had not ended when the recording did")
    rig.group.die(in_flight=False)
    await rig.run
    assert (rig.replay.failed, rig.replay.sent) == ([], 1)
    assert rig.replay.death is not None


@pytest.mark.asyncio
async def test_a_stream_is_read_to_its_end(short_path: Path) -> None:
    rig = Rig(short_path, [""])
    await rig.sent(1)
    (request,) = rig.group.batches[0]
    pauses: list[None] = []
    for _ in range(3):
        request.chunk(Answer(0, 4), b"four", 4, lambda: pauses.append(None))
        await until(lambda: request.stream is not None and request.stream.has_room)
    request.answer(Answer(0, 0), b"")
    rig.group.free()
    await rig.run
    assert rig.told() == ["batch 1: 1 request, ok"]
    assert pauses  # somebody has read


@pytest.mark.asyncio
async def test_a_stream_that_breaks_off_is_a_failure(short_path: Path) -> None:
    rig = Rig(short_path, [""])
    await rig.sent(1)
    rig.group.batches[0][0].chunk(Answer(0, 4), b"four", 100, lambda: None)
    rig.group.die()
    await rig.run
    assert rig.replay.failed == [1]


@pytest.mark.asyncio
async def test_a_group_that_does_not_start_raises_and_leaves_nothing(short_path: Path) -> None:
    FakeGroup.start_error = WorkerFailed("m/0: rank 1 cannot load")
    rig = Rig(short_path, [""])
    with pytest.raises(WorkerFailed, match="rank 1 cannot load"):
        await rig.run
    assert rig.group.calls[-1] == "kill"
    assert os.listdir(short_path) == []


@pytest.mark.asyncio
async def test_a_replay_that_is_stopped_leaves_nothing(short_path: Path) -> None:
    rig = Rig(short_path, [""])
    await rig.sent(1)
    rig.run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rig.run
    assert rig.group.calls[-1] == "kill"
    assert os.listdir(short_path) == []


# ── --nproc ──


@pytest.mark.parametrize(
    ("spec", "nproc", "world_size", "parallel"),
    [
        (make_spec(2), None, 2, True),
        (make_spec(2), 2, 2, True),
        (make_spec(2), 4, 4, True),
        (make_spec(2), 1, 1, True),
        (make_spec(1), 1, 1, False),
        (make_spec(1), 3, 3, True),
        (make_spec(4, config=model_config("pp", parallel_level=4)), 2, 2, True),
    ],
)
def test_a_model_is_played_with_other_ranks(
    spec: ModelSpec, nproc: int | None, world_size: int, parallel: bool
) -> None:
    changed = with_ranks(spec, nproc)
    assert changed.world_size == world_size
    assert changed.config.is_parallel == parallel
    if nproc is not None and nproc != spec.world_size:
        assert changed.config.world_size(0) == nproc


@pytest.mark.parametrize(
    ("spec", "nproc", "allowed"),
    [(make_spec(2), 0, "an integer >= 1"), (make_spec(1, config=model_config("custom")), 2, "one process: 1")],
)
def test_ranks_that_no_model_can_have_are_refused(spec: ModelSpec, nproc: int, allowed: str) -> None:
    with pytest.raises(RecordingError, match=f"nproc: found {nproc}, allowed.*{allowed}"):
        with_ranks(spec, nproc)
