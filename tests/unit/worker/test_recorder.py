import asyncio
from pathlib import Path

import pytest

from minserve.dispatch.dispatcher import Dispatcher
from minserve.errors import WorkerFailed
from minserve.telemetry.events import EventLog
from minserve.wire.recording import AnyRecord, Ended, Gap, Header, RecordReader, Sent, Stopped, decode
from minserve.worker.devices import DeviceAllocator, Inventory
from minserve.worker.recorder import Recorder
from minserve.worker.worker import Worker
from tests.unit.worker.broadcasts import Group, failure, request
from tests.unit.worker.groups import FakeGroup, no_ranks, no_starter
from tests.unit.worker.specs import make_spec

pytestmark = pytest.mark.asyncio

HEADER = Header("0.1.0", "m", "1.0", "m/0", 2, 4, bodies=True, began=17.0)


class Rig:
    """A recorder and its reader."""

    def __init__(self, bodies: bool = True, room: int = 10_000) -> None:
        header = Header("0.1.0", "m", "1.0", "m/0", 2, 4, bodies, 17.0)
        self.recorder = Recorder(header, room, now=lambda: 18.0)
        self.recorder.begin("m-0-a")
        self._reader = RecordReader()

    def send(self, seq: int, *bodies: bytes) -> None:
        self.recorder.batch(seq, [request(body) for body in bodies])

    async def read(self) -> list[AnyRecord]:
        """What waits, without the header."""
        async with asyncio.timeout(10):
            data = await self.recorder.next()
        assert data is not None
        records = [decode(record) for record in self._reader.received(data)]
        return [record for record in records if not isinstance(record, Header)]


async def test_a_recording_begins_with_its_header() -> None:
    data = await Recorder(HEADER).next()
    assert data is not None
    assert [decode(record) for record in RecordReader().received(data)] == [HEADER]


async def test_batches_are_recorded_with_their_bodies_and_how_they_ended() -> None:
    rig = Rig()
    rig.send(1, b"a", b"bb")
    rig.recorder.ended(1)
    rig.send(2, b"")
    rig.recorder.ended(2, "boom")
    first, *others = await rig.read()
    assert isinstance(first, Sent)
    assert (first.incarnation, first.seq, first.at, first.bodies) == ("m-0-a", 1, 18.0, (b"a", b"bb"))
    assert first.requests == (request(b"a").meta, request(b"bb").meta)
    assert [(type(record), record.seq) for record in others if isinstance(record, Sent | Ended)] == [
        (Ended, 1),
        (Sent, 2),
        (Ended, 2),
    ]
    assert others[-1] == Ended("m-0-a", 2, 18.0, "boom")


async def test_without_bodies_only_their_lengths_are_kept() -> None:
    rig = Rig(bodies=False)
    rig.send(1, b"secret")
    (sent,) = await rig.read()
    assert isinstance(sent, Sent)
    assert sent.bodies is None
    assert [part.length for part in sent.requests[0].parts] == [6]


async def test_each_life_of_the_worker_has_its_name() -> None:
    rig = Rig()
    rig.send(7, b"")
    rig.recorder.begin("m-0-b")
    rig.recorder.ended(7)  # of a life that is over
    rig.send(1, b"")
    rig.recorder.ended(1)
    found = [(r.incarnation, r.seq) for r in await rig.read() if isinstance(r, Sent | Ended)]
    assert found == [("m-0-a", 7), ("m-0-b", 1), ("m-0-b", 1)]


async def test_the_end_of_a_batch_that_was_sent_before_the_recording_is_not_recorded() -> None:
    rig = Rig()
    rig.recorder.ended(5)
    rig.send(6, b"")
    assert [type(record) for record in await rig.read()] == [Sent]


@pytest.mark.parametrize("bodies", [True, False])
async def test_what_is_not_read_in_time_is_dropped_and_counted(bodies: bool) -> None:
    rig = Rig(bodies, room=1000)
    await rig.read()
    for seq in range(1, 101):
        rig.send(seq, b"x" * 50)
        rig.recorder.ended(seq)
    before = [record for record in await rig.read() if isinstance(record, Sent)]
    assert [record.seq for record in before] == list(range(1, len(before) + 1))
    assert 2 < len(before) < 20
    rig.send(101, b"")
    gap, sent = await rig.read()
    assert gap == Gap(100 - len(before))
    assert isinstance(sent, Sent)
    assert sent.seq == 101


async def test_a_batch_over_the_room_goes_when_nothing_waits() -> None:
    rig = Rig(room=100)
    await rig.read()
    rig.send(1, b"x" * 1000)
    rig.send(2, b"x" * 1000)
    assert [type(record) for record in await rig.read()] == [Sent]
    rig.send(3, b"x" * 1000)
    assert [type(record) for record in await rig.read()] == [Gap, Sent]


async def test_the_reader_waits_for_what_comes_next() -> None:
    rig = Rig()
    await rig.read()
    reading = asyncio.create_task(rig.read())
    await asyncio.sleep(0)
    assert not reading.done()
    rig.send(1, b"")
    assert [type(record) for record in await reading] == [Sent]


async def test_the_end_is_told_after_all_that_waits_and_nothing_follows() -> None:
    rig = Rig(room=300)
    await rig.read()
    for seq in range(1, 10):
        rig.send(seq, b"x" * 200)
    rig.recorder.close("m/0 was stopped")
    rig.recorder.close("again")
    rig.send(11, b"")
    assert [type(record) for record in await rig.read()] == [Sent, Gap, Stopped]
    assert await rig.recorder.next() is None
    assert await rig.recorder.next() is None


# ── the hooks ──


async def test_a_broadcast_tells_its_recorder_what_goes_out_and_how_it_ends() -> None:
    group = Group(ranks=2, in_flight=4)
    rig = Rig()
    group.send(b"before")
    group.broadcast.recorder = rig.recorder
    group.send(b"a", b"b")
    group.send(b"c")
    group.send(b"d")
    group.reply(1, b"")
    group.reply(2, b"A", b"B")
    for rank in (0, 1):
        group.error(rank, 3, failure())
    group.broadcast.fail_all(WorkerFailed("m/0: rank 1 died"), begun=4)
    assert [
        (type(record), record.seq, getattr(record, "error", None))
        for record in await rig.read()
        if isinstance(record, Sent | Ended)
    ] == [
        (Sent, 2, None),
        (Sent, 3, None),
        (Sent, 4, None),
        (Ended, 2, ""),
        (Ended, 3, "Prediction failed: m/0, rank 0 (pid 4000): ValueError: no such word"),
        (Ended, 4, "m/0: rank 1 died"),
    ]


class RecordedGroup(FakeGroup):
    """A fake group that remembers its recorder."""

    def record(self, recorder: Recorder | None) -> None:
        self.recorder = recorder


def make_worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    no_ranks(monkeypatch)
    monkeypatch.setattr("minserve.worker.worker.RankGroup", RecordedGroup)
    dispatcher = Dispatcher(asyncio.get_running_loop(), "m", 1, 0.0, 10)
    devices = DeviceAllocator(Inventory())
    return Worker(make_spec(), 0, Path("/run/m1"), dispatcher, devices, no_starter(), EventLog("m"))


def recorder_of(group: FakeGroup) -> Recorder | None:
    assert isinstance(group, RecordedGroup)
    return group.recorder


async def test_a_recording_goes_on_over_a_restart_and_ends_with_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(monkeypatch)
    recorder = Recorder(HEADER)
    assert worker.attach_recorder(recorder)  # before the first start
    await worker.start()
    assert recorder_of(FakeGroup.made[-1]) is recorder
    FakeGroup.made[-1].failed.set_result(WorkerFailed("died"))
    await worker.failed()
    await worker.start()
    assert len(FakeGroup.made) == 2
    assert recorder_of(FakeGroup.made[-1]) is recorder
    await worker.stop(0.0)
    data = await recorder.next()
    assert data is not None
    assert decode(list(RecordReader().received(data))[-1]) == Stopped("m/0 was stopped")
    assert await recorder.next() is None


async def test_a_worker_has_one_recorder_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(monkeypatch)
    await worker.start()
    first, second = Recorder(HEADER), Recorder(HEADER)
    assert worker.attach_recorder(first)
    assert not worker.attach_recorder(second)
    assert recorder_of(FakeGroup.made[-1]) is first
    worker.detach_recorder()
    assert recorder_of(FakeGroup.made[-1]) is None
    assert worker.attach_recorder(second)
    await worker.stop(0.0)
