import json
from contextlib import AsyncExitStack

import pytest

from minserve.dispatch.request import Request
from minserve.frontend import connections
from tests.unit.frontend.rig import Rig, status_of, with_options
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio

PING = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"


@with_options(max_connections=2)
async def test_one_connection_too_many_is_answered_and_closed(rig: Rig) -> None:
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(rig.client()) for _ in range(2)]
        for client in (first, second):
            client.send(PING)
            assert (await client.answer())[0] == 200
        async with rig.client() as third:
            third.send(PING)
            status, head, body = await third.answer()
            assert await third.rest() == b""
        assert (status, json.loads(body)) == (
            503,
            {
                "code": 503,
                "type": "ServiceUnavailableException",
                "message": "the server has 2 client connections, max_connections allows no more",
            },
        )
        for line in (b"Retry-After: 1", b"Connection: close", b"Server: minserve", b"Content-Type: application/json"):
            assert b"\r\n" + line + b"\r\n" in head
        assert b"\r\nx-request-id: " in head
        for client in (first, second):
            client.send(PING)
            assert (await client.answer())[0] == 200, "nobody else is disturbed"


@with_options(max_connections=1)
async def test_a_place_is_free_again_when_a_client_has_left(rig: Rig) -> None:
    for _ in range(3):
        async with rig.client() as client:
            client.send(PING)
            assert (await client.answer())[0] == 200
        await until(lambda: not rig.connections.connections)


@with_options(max_connections=1)
async def test_the_ports_are_counted_apart(rig: Rig) -> None:
    """Whoever fills one does not keep an operator from the other."""
    async with rig.client() as client:
        client.send(PING)
        await client.answer()
        async with rig.management.get("/models") as response:
            assert response.status == 200


@with_options(max_connections=1)
async def test_a_refused_client_that_sends_nothing_is_closed_too(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LOOK_EVERY_S", 0.01)
    async with rig.client() as client:
        client.send(PING)
        await client.answer()
        async with rig.client() as other:
            assert status_of(await other.rest()) == 503


async def test_the_looks_go_on_by_themselves_until_the_end(
    rig: Rig, held: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LOOK_EVERY_S", 0.001)
    looks: list[float] = []
    monkeypatch.setattr(rig.connections, "look", looks.append)
    rig.connections._look_and_again()
    await until(lambda: len(looks) > 3)
    await rig.connections.shutdown(0)
    assert rig.connections._timer.cancelled()
