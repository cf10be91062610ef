"""What is no prediction goes to the server as it came, and its answer to the client as it was."""

import asyncio
import json
import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp import web

from minserve.config.server import ServerOptions
from minserve.frontend.app import combined_app
from tests.unit.frontend.rig import FakeSupervisor
from tests.unit.frontends.rig import Behind
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio

STREAM = b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n"


class Combined(Behind):
    """Inference and management on one address, and one more route behind it."""

    make_app = staticmethod(combined_app)


@pytest_asyncio.fixture
async def combined(options: ServerOptions, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Combined]:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    async with Combined(options) as rig:
        yield rig


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("/models", "localhost", 200),
        ("/models", "evil.example", 403),
        ("http://evil.example/models", "localhost", 403),
        ("http://localhost/models", "localhost", 200),
        ("/ping", "evil.example", 200),
        ("/models/m/invoke", "evil.example", 200),
    ],
)
async def test_hosts_are_judged_as_they_were_sent(combined: Combined, target: str, host: str, status: int) -> None:
    head = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert (await combined.raw(head.encode()))[0] == status


async def test_two_hosts_are_both_judged(combined: Combined) -> None:
    head = b"GET /models HTTP/1.1\r\nHost: localhost\r\nX: y\r\nhost: evil.example\r\nConnection: close\r\n\r\n"
    assert (await combined.raw(head))[0] in (400, 403)


async def test_the_servers_own_head_comes_through(rig: Behind) -> None:
    direct = await rig.management.get("/ping", headers={"x-request-id": "mine"})
    passed = await rig.inference.get("/ping", headers={"x-request-id": "mine"})
    assert passed.status == direct.status
    assert await passed.read() == await direct.read()
    assert {**passed.headers, "Date": ""} == {**direct.headers, "Date": ""}


async def test_a_body_goes_along_when_the_server_wants_it(combined: Combined) -> None:
    """In one piece, in pieces, and asked for with `Expect`."""
    form = b"url=none.mar&initial_workers=1"
    head = b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    length = b"Content-Length: %d\r\n" % len(form)
    told = set()
    async with combined.client() as client:
        client.send(head + length + b"\r\n" + form)
        told.add((await client.answer())[::2])
        client.send(head + length + b"\r\n" + form[:9])
        await asyncio.sleep(0)
        client.send(form[9:])
        told.add((await client.answer())[::2])
        client.send(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(form), form))
        told.add((await client.answer())[::2])
    assert len(told) == 1, told


async def test_a_client_that_leaves_leaves_the_server_too(combined: Combined) -> None:
    left = asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first")
        try:
            await asyncio.sleep(3600)
        finally:
            left.set()
        return response

    serve_also(combined, hang)
    async with combined.client() as client:
        client.send(STREAM)
        assert b"first" in await client.reader.readuntil(b"first")
    async with asyncio.timeout(10):
        await left.wait()


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_an_answer_that_breaks_off_is_seen_to(combined: Combined, version: bytes) -> None:
    async def break_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b"first")
        assert request.transport is not None
        await until(lambda: not request.transport or not request.transport.get_write_buffer_size())
        request.transport.close()
        return response

    serve_also(combined, break_off)
    async with combined.client() as client:
        client.send(STREAM.replace(b"1.1", version))
        if version == b"1.0":
            with pytest.raises(ConnectionResetError):
                await client.rest()
        else:
            rest = await client.rest()
            assert b"first" in rest
            assert not rest.endswith(b"0\r\n\r\n")


async def test_without_the_server_it_is_a_503_that_says_so(rig: Behind) -> None:
    rig.handover.close()
    answer = await rig.inference.get("/ping")
    assert answer.status == 503
    assert re.match("the server (cannot be reached|has not answered)", json.loads(await answer.read())["message"])


def serve_also(rig: Behind, handler: object) -> None:
    """Puts a handler in the place of the one for all other paths."""
    resource = list(rig._server.app.router.resources())[-2]
    (route,) = resource
    route._handler = handler  # type: ignore[assignment]
