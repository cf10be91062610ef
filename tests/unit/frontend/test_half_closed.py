"""Clients that end their direction: some wait for their answers, others have gone."""

import asyncio

import pytest

from minserve.dispatch.request import Request
from minserve.frontend import half_closed
from minserve.frontend.half_closed import abort_if_gone
from minserve.wire.messages import Answer
from tests.unit.frontend.rig import Rig
from tests.unit.worker.specs import until

pytestmark = [pytest.mark.asyncio, pytest.mark.parametrize("express", [True, False], ids=["express", "aiohttp"])]

HEAD = b"GET /ping HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("requests", [1, 3])
async def test_a_client_that_ends_its_direction_gets_its_answers(rig: Rig, requests: int) -> None:
    async with rig.client() as client:
        client.send(POST * requests)
        client.writer.write_eof()
        for _ in range(requests):
            assert (await client.final_answer())[0] == 200
        await rig.pass_time(0)
        assert await client.rest() == b""
    assert len(rig.lane.requests) == requests


def record_looks(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.Transport]:
    """The connections that were probed, and found to be still there or not."""
    looked: list[asyncio.Transport] = []

    def look(transport: asyncio.Transport) -> None:
        abort_if_gone(transport)
        looked.append(transport)

    monkeypatch.setattr(half_closed, "abort_if_gone", look)
    return looked


async def test_a_client_that_ends_its_direction_while_it_waits_gets_its_answer(
    rig: Rig, held: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = record_looks(monkeypatch)
    async with rig.client() as client:
        client.send(POST)
        await until(lambda: held)
        client.writer.write_eof()
        assert await client.answer() == (100, b"HTTP/1.1 100 Continue\r\n\r\n", b"")
        await until(lambda: looked)  # by then one that has gone is found out
        await rig.pass_time(1)
        held[0].answer(Answer(0, 2), b"ok")
        assert (await client.answer())[::2] == (200, b"ok")
        assert await client.rest() == b""


@pytest.mark.parametrize("waits", [True, False], ids=["while it waits", "at once"])
@pytest.mark.parametrize("pipelined", [1, 2])
async def test_a_client_that_closes_leaves_the_queue(rig: Rig, waits: bool, pipelined: int) -> None:
    dispatcher = rig.add("slow")
    async with rig.client() as client:
        client.send(POST.replace(b"/m", b"/slow") * pipelined)
        if waits:
            await until(lambda: dispatcher.queued == 1)
        client.writer.close()
        await until(lambda: rig.connections.requests_count)
        await until(lambda: not rig.connections.connections)
    assert dispatcher.queued == 0
    assert dispatcher._live == set()


async def test_a_client_of_http_1_0_that_ends_its_direction_counts_as_gone(rig: Rig) -> None:
    """There is no interim answer by which it could be told apart from one that has left."""
    dispatcher = rig.add("slow")
    async with rig.client() as client:
        client.send(b"POST /predictions/slow HTTP/1.0\r\n\r\n")
        await until(lambda: dispatcher.queued == 1)
        client.writer.write_eof()
        await until(lambda: dispatcher.queued == 0)
        assert await client.rest() == b""


async def test_a_client_that_ends_its_direction_within_a_head_is_closed(rig: Rig) -> None:
    async with rig.client() as client:
        client.send(HEAD[:-2])
        client.writer.write_eof()
        assert await client.rest() == b""
    await until(lambda: not rig.connections.connections)


async def test_a_client_that_leaves_long_after_it_has_ended_its_direction_leaves_the_queue(
    rig: Rig, held: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = record_looks(monkeypatch)
    async with rig.client() as client:
        client.send(POST)
        await until(lambda: held)
        client.writer.write_eof()
        assert (await client.answer())[0] == 100
        await until(lambda: looked)
        await rig.pass_time(100)
        assert rig.connections.connections
        client.reset()
        async with asyncio.timeout(10):
            while rig.connections.connections:
                await rig.pass_time(1)
    assert rig.registry.find("m").dispatcher._live == set()
