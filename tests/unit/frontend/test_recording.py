import asyncio

import pytest

from minserve.dispatch.request import Request
from minserve.wire.messages import Part, RequestMeta
from minserve.wire.recording import AnyRecord, Header, RecordReader, Sent, Stopped, decode
from minserve.worker.recorder import Recorder
from tests.unit.frontend.rig import Rig
from tests.unit.frontend.test_management import report
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio


class FakeWorker:
    """Worker 0 of a model; tests do what its ranks would."""

    who = "m/0"

    def __init__(self) -> None:
        self.recorder: Recorder | None = None

    def attach_recorder(self, recorder: Recorder) -> bool:
        if self.recorder is not None:
            return False
        self.recorder = recorder
        return True

    def detach_recorder(self) -> None:
        self.recorder = None

    def send(self, seq: int, body: bytes) -> None:
        assert self.recorder is not None
        meta = RequestMeta("id", (), (Part("body", "", len(body)),))
        self.recorder.batch(seq, [Request(meta, [body], 0.0, asyncio.get_running_loop().create_future())])

    def begun(self) -> bool:
        return self.recorder is not None

    def over(self) -> bool:
        return self.recorder is None


@pytest.fixture
def worker(rig: Rig) -> FakeWorker:
    worker = FakeWorker()
    supervisor = rig.supervisor()
    supervisor.reports = [report()]
    supervisor.worker = {0: worker}.get  # type: ignore[attr-defined]
    return worker


def parse(data: bytes) -> list[AnyRecord]:
    return [decode(record) for record in RecordReader().received(data)]


@pytest.mark.parametrize(
    ("path", "bodies"),
    [
        ("/models/m/record", False),
        ("/models/m/1.0/record", False),
        ("/models/m/record?worker=0&bodies=false", False),
        ("/models/m/record?bodies=true", True),
    ],
)
async def test_a_recording_is_streamed_until_the_worker_ends(
    rig: Rig, worker: FakeWorker, path: str, bodies: bool
) -> None:
    async with rig.management.get(path) as response:
        assert response.status == 200
        assert response.content_type == "application/octet-stream"
        worker.send(1, b"abc")
        begin = await response.content.readany()
        assert isinstance(parse(begin)[0], Header)
        worker.send(2, b"")
        assert worker.recorder is not None
        worker.recorder.close("m/0 was stopped")
        records = parse(begin + await response.read())
    header, *others = records
    assert isinstance(header, Header)
    assert (header.model, header.version, header.who, header.world_size, header.batch_size) == ("m", "1.0", "m/0", 1, 1)
    assert header.bodies == bodies
    sent = [record for record in others if isinstance(record, Sent)]
    assert [(record.seq, record.bodies) for record in sent] == [
        (1, (b"abc",) if bodies else None),
        (2, (b"",) if bodies else None),
    ]
    assert others[-1] == Stopped("m/0 was stopped")
    await until(worker.over)


async def test_a_worker_is_recorded_once_at_a_time(rig: Rig, worker: FakeWorker) -> None:
    async with rig.management.get("/models/m/record") as first:
        assert first.status == 200
        async with rig.management.get("/models/m/record") as second:
            assert second.status == 409
            assert "m/0 is being recorded already" in (await second.json())["message"]
        assert worker.begun()
    await until(worker.over)


async def test_a_client_that_leaves_ends_the_recording(rig: Rig, worker: FakeWorker) -> None:
    async with rig.management.get("/models/m/record") as response:
        await response.content.readany()
        response.close()
    await until(worker.over)
    async with rig.management.get("/models/m/record") as response:  # and makes room for another
        assert response.status == 200
    await until(worker.over)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/models/none/record", 404, "Model not found: none"),
        ("/models/m/2.0/record", 404, "Model version: 2.0 does not exist"),
        ("/models/m/record?worker=1", 404, "worker: found 1, allowed: 0"),
        ("/models/m/record?worker=99999999999999999999", 404, "worker: found 99999999999999999999, allowed: 0"),
        ("/models/m/record?worker=-1", 400, "worker: found '-1', allowed: 0"),
        ("/models/m/record?worker=first", 400, "worker: found 'first', allowed: 0"),
        ("/models/m/record?worker=%C2%B2", 400, "allowed: 0"),
        ("/models/m/record?bodies=yes", 400, "bodies: found 'yes', allowed: true, false"),
    ],
)
async def test_what_cannot_be_recorded_is_told(
    rig: Rig, worker: FakeWorker, path: str, status: int, message: str
) -> None:
    async with rig.management.get(path) as response:
        assert response.status == status
        assert message in (await response.json())["message"]
    assert worker.over()


async def test_a_model_without_workers_says_so(rig: Rig, worker: FakeWorker) -> None:
    rig.supervisor().reports = []
    rig.supervisor().worker = {}.get  # type: ignore[attr-defined]
    async with rig.management.get("/models/m/record") as response:
        assert response.status == 404
        assert "m has no worker just now" in (await response.json())["message"]
