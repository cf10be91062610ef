"""What differs from one process: the server judges, and a frontend process asks it."""

import asyncio
from pathlib import Path

import pytest

from minserve.dispatch.request import Request
from minserve.errors import DeadlineExceeded, NoWorkers, QueueFull
from minserve.frontend.auth import KEY_FILE, Keys, Kind
from minserve.frontend.passage import Passage
from minserve.frontends.relay import Relay
from minserve.wire.messages import Answer
from tests.unit.frontend.rig import MAX_BODY, FakeSupervisor
from tests.unit.frontends.rig import Behind
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio

TOO_LARGE = b"x" * (MAX_BODY + 1)


@pytest.mark.parametrize("body", [b"x", TOO_LARGE])
@pytest.mark.parametrize("path", ["/predictions/none", "/v2/models/none/infer", "/none/predict?a=1"])
async def test_an_unknown_model_goes_before_what_is_wrong_with_the_body(rig: Behind, path: str, body: bytes) -> None:
    answer = await rig.inference.post(path, data=body)
    assert (answer.status, (await answer.json())["type"]) == (404, "ModelNotFoundException")


async def test_an_unknown_model_is_told_before_its_body_has_come(rig: Behind) -> None:
    head = b"POST /predictions/none HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 100\r\n\r\n"
    async with rig.client() as client:
        client.send(head)
        assert (await client.answer())[0] == 404


async def test_the_key_goes_before_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    keys = Keys(tmp_path / KEY_FILE, 60.0)
    async with Behind(keys=keys) as rig:
        for path in ("/predictions/m", "/predictions/none", "/invocations", "/m/predict?" + "a=1&" * 2000):
            for body in (b"x", TOO_LARGE):
                answer = await rig.inference.post(path, data=body)
                assert (answer.status, (await answer.json())["type"]) == (400, "InvalidKeyException")
        for _ in range(3):
            keys.renew(Kind.INFERENCE)
            headers = {"Authorization": f"Bearer {keys._keys[Kind.INFERENCE].text}"}
            answer = await rig.inference.post("/predictions/m", data=b"x", headers=headers)
            assert (answer.status, await answer.read()) == (200, b"x")


async def test_errors_keep_all_that_they_say(rig: Behind, held: list[Request]) -> None:
    full = QueueFull("full")
    full.retry_after = 7.2
    for error, status, retry_after in ((full, 503, "8"), (DeadlineExceeded("late"), 504, None)):
        asked = asyncio.create_task(rig.inference.post("/predictions/m", data=b"x"))
        await until(lambda: held)
        held.pop().fail(error)
        answer = await asked
        told = await answer.json()
        assert (answer.status, told["type"], told["message"]) == (status, error.type_name, str(error))
        assert answer.headers.get("Retry-After") == retry_after


async def test_a_model_without_workers_is_named_as_in_one_process(rig: Behind) -> None:
    rig.registry.find("m").dispatcher.refuse(NoWorkers("m"))
    answer = await rig.inference.post("/predictions/m/1.0", data=b"x")
    assert (answer.status, (await answer.json())["message"]) == (503, str(NoWorkers("m", "1.0")))


async def test_clients_that_leave_take_their_requests_along(rig: Behind, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
        await until(lambda: held)
    await until(lambda: held[0].reply.cancelled())
    assert not rig.door._waiting
    assert not rig.uplink._waiting


async def test_a_process_that_goes_takes_its_requests_along(rig: Behind, held: list[Request]) -> None:
    async with rig.client() as first, rig.client() as second:
        for client in (first, second):
            client.send(b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
        await until(lambda: len(held) == 2)
        held[0].chunk(Answer(0, 1), b"y", 10, lambda: None)
        await until(lambda: rig.door._relays)
        rig.door.close()
        assert held[0].left
        assert held[1].left
        assert held[0].stream is not None
        assert held[0].stream.muted


async def test_what_is_measured_is_told_when_it_is_asked_for(rig: Behind) -> None:
    for _ in range(3):
        assert (await rig.inference.post("/predictions/m", data=b"x")).status == 200
    assert (await rig.inference.post("/predictions/none", data=b"x")).status == 404
    assert (await rig.inference.get("/ping")).status == 200  # the server itself has counted it
    assert rig.registry.metrics.gather is not None
    await rig.registry.metrics.gather()
    text = rig.registry.metrics.text()
    assert 'Requests2XX{Level="Host",Hostname="' in text
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("Requests")] == ["4.0", "1.0"]
    frontend = rig.registry.find("m").dispatcher.meters.frontend
    assert frontend.buckets()[-1][1] == 3


async def test_the_first_chunks_come_with_the_head(
    rig: Behind, held: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def say_nothing(relay: Relay) -> None:
        pass

    monkeypatch.setattr(Relay, "_run", say_nothing)
    async with rig.client() as client:
        client.send(b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
        await until(lambda: held)
        for chunk in (b"one", b"", b"two"):
            held[0].chunk(Answer(0, len(chunk)), chunk, 100, lambda: None)
        async with asyncio.timeout(10):
            assert await client.reader.readuntil(b"two\r\n")
        rig.door.close()


async def test_small_predictions_go_past_aiohttp_here_too(rig: Behind, held: list[Request]) -> None:
    async with rig.client() as client:
        for body in (b"first", b"second"):
            client.send(b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            await until(lambda: held)
            (asked,) = rig.uplink._waiting.values()
            assert isinstance(asked.reply, Passage)
            held.pop().answer(Answer(0, len(body)), body)
            assert (await client.answer())[::2] == (200, body)
    assert not rig.uplink._waiting
    assert rig.in_flight.used == 0
