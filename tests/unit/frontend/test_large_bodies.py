"""Large bodies lie in the model's arena from their first byte until their requests are answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from minserve.dispatch.request import Request
from minserve.errors import HandlerError
from minserve.wire.arena import BLOCK_BYTES, SHARE_FROM, Arena, Marks, new_memory
from minserve.wire.messages import Answer
from minserve.wire.views import Views
from tests.unit.frontend.rig import Raw, Rig, with_options
from tests.unit.worker.specs import until

pytestmark = [
    pytest.mark.asyncio,
    with_options(max_request_size=2**22, max_in_flight_bytes=2**24, body_timeout=0.5),
]

SIZE = SHARE_FROM + 5
BODY = bytes(range(256)) * (SHARE_FROM // 256) + b"abcde"
HEAD = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % SIZE


def arena_of(rig: Rig) -> Arena:
    arena = rig.registry.find("m").dispatcher.arena
    assert arena is not None
    return arena


def shared(request: Request) -> list[int]:
    """Which parts are in the arena; those must be what the ranks will see."""
    segments = request.segments or {}
    for index, segment in segments.items():
        assert request.bodies[index] == segment.view
        assert segment.length == request.meta.parts[index].length
    return sorted(segments)


@pytest.mark.parametrize(("size", "parts"), [(SHARE_FROM - 1, []), (SHARE_FROM, [0]), (2**21, [0])])
async def test_a_body_from_the_threshold_on_is_in_the_arena(
    rig: Rig, held: list[Request], size: int, parts: list[int]
) -> None:
    body = bytes(size - 3) + b"end"
    async with rig.client() as client:
        client.send(HEAD + b"Content-Length: %d\r\n\r\n" % size + body)
        await until(lambda: held)
        assert shared(held[0]) == parts
        assert held[0].bodies[0] == body
        assert bool(arena_of(rig).used) == bool(parts)
        held[0].answer(Answer(0, 2), b"ok")
        assert (await client.answer())[::2] == (200, b"ok")
    assert arena_of(rig).used == 0


async def test_a_declared_body_is_received_there(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(HEAD + LENGTH + BODY[:1])
        await until(lambda: arena_of(rig).used)
        await until(lambda: arena_of(rig)._view[0:1] == BODY[:1] and not held)
        client.send(BODY[1:])
        await until(lambda: held)
        assert held[0].bodies[0] == BODY
        held[0].fail(HandlerError("no"))


async def test_a_body_without_a_length_is_copied_there(rig: Rig, held: list[Request]) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield BODY[:1000]
        yield BODY[1000:]

    answer = asyncio.create_task(rig.inference.post("/predictions/m", data=chunks()))
    await until(lambda: held)
    assert shared(held[0]) == [0]
    assert held[0].bodies[0] == BODY
    held[0].answer(Answer(0, 2), b"ok")
    (await answer).release()


async def test_of_a_form_the_large_fields_are(rig: Rig, held: list[Request]) -> None:
    form = b"".join(
        b'--xyz\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % part
        for part in [(b"small", b"s"), (b"large", BODY), (b"also", BODY[::-1])]
    )
    kind = {"Content-Type": "multipart/form-data; boundary=xyz"}
    answer = asyncio.create_task(rig.inference.post("/predictions/m", data=form + b"--xyz--\r\n", headers=kind))
    await until(lambda: held)
    assert shared(held[0]) == [1, 2]
    assert [bytes(body) for body in held[0].bodies] == [b"s", BODY, BODY[::-1]]
    held[0].answer(Answer(0, 2), b"ok")
    (await answer).release()
    assert arena_of(rig).used == 0


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=xyz"])
async def test_a_body_for_which_there_is_no_room_goes_without(rig: Rig, held: list[Request], kind: str) -> None:
    rig.registry.find("m").dispatcher.arena = arena = Arena(new_memory("test", BLOCK_BYTES))
    rest = b"\r\n--xyz--\r\n"
    body = b'--xyz\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + BODY + rest
    answer = asyncio.create_task(rig.inference.post("/predictions/m", data=body, headers={"Content-Type": kind}))
    await until(lambda: held)
    assert shared(held[0]) == []
    assert held[0].bodies[0] in (body, BODY)
    held[0].answer(Answer(0, 2), b"ok")
    (await answer).release()
    assert arena.used == 0


async def answered(client: Raw, held: list[Request]) -> None:
    client.send(HEAD + LENGTH + BODY)
    await until(lambda: held)
    held[0].answer(Answer(0, 2), b"ok")


async def failed(client: Raw, held: list[Request]) -> None:
    client.send(HEAD + LENGTH + BODY)
    await until(lambda: held)
    held[0].fail(HandlerError("no"))


async def expired(client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"x-request-timeout-ms: 20\r\n" + LENGTH + BODY)
    assert (await client.answer())[0] == 504


async def left(client: Raw, held: list[Request]) -> None:
    client.send(HEAD + LENGTH + BODY)
    await until(lambda: held)
    client.reset()


async def left_amid_its_body(client: Raw, held: list[Request]) -> None:
    client.send(HEAD + LENGTH + BODY[:100])
    await client.writer.drain()
    client.reset()


async def cut_short(client: Raw, held: list[Request]) -> None:
    client.send(HEAD + LENGTH + BODY[:100])
    client.writer.write_eof()
    assert (await client.answer())[0] == 400


async def stalled(client: Raw, held: list[Request]) -> None:
    client.send(HEAD + LENGTH + BODY[:100])
    status, _, text = await client.answer()
    assert status == 408
    assert b"; 100 of its %d bytes had arrived" % SIZE in text


async def stalled_after_its_head(client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"Expect: 100-continue\r\n" + LENGTH)
    assert (await client.answer())[0] == 100
    client.send(BODY[:100])
    status, _, text = await client.answer()
    assert status == 408
    assert b"; 100 of its %d bytes had arrived" % SIZE in text


async def streamed(client: Raw, held: list[Request]) -> None:
    client.send(HEAD + LENGTH + BODY)
    await until(lambda: held)
    held[0].chunk(Answer(0, 3), b"one", 100, lambda: None)
    await client.reader.readuntil(b"one")
    held[0].answer(Answer(0, 0), b"")


@pytest.mark.parametrize(
    "ends",
    [
        answered,
        failed,
        expired,
        left,
        left_amid_its_body,
        cut_short,
        stalled,
        stalled_after_its_head,
        streamed,
    ],
)
async def test_the_arena_is_empty_however_a_request_ends(
    rig: Rig, held: list[Request], ends: Callable[[Raw, list[Request]], Awaitable[None]]
) -> None:
    async with rig.client() as client:
        await ends(client, held)
        await until(lambda: rig.connections.requests_count)
        await until(lambda: arena_of(rig).used == 0)


async def test_an_answer_that_is_a_view_is_held_until_the_client_has_taken_it(rig: Rig, held: list[Request]) -> None:
    size = 2**24  # more than the sockets take
    descriptor = new_memory("test", size)
    arena, marks = Arena(descriptor), Marks(new_memory("test", Marks.size(1, size // BLOCK_BYTES)), 1)
    views = Views(arena.open_for_readers(), marks.rows[0])
    segment = arena.allocate(size)
    assert segment is not None
    segment.view[:] = BODY[:256] * (size // 256)
    async with rig.client(receive_buffer=4096) as client:
        client.send(HEAD + b"Content-Length: 0\r\n\r\n")
        await until(lambda: held)
        held.pop().answer(Answer(0, size), views.view(segment.block, segment.use, size))
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert b"Content-Length: %d\r\n" % size in head
        assert views.held == size
        body = await client.reader.readexactly(size)
        same = body == segment.view
        assert same
        await until(lambda: views.held == 0)
