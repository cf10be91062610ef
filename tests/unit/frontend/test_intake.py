"""Bodies that go past the parser, and what comes behind them."""

import asyncio
import itertools
import random
import ssl
from collections.abc import Awaitable, Callable

import pytest

from minserve.config.server import ServerOptions
from minserve.frontend.intake import STEP, TURN, WORTH, Intake
from minserve.frontend.tls import read_identity, tls_context
from minserve.wire.arena import SHARE_FROM, Arena
from tests.unit.frontend.rig import Raw, Rig, with_options
from tests.unit.worker.specs import until

pytestmark = [
    pytest.mark.asyncio,
    with_options(max_request_size=2**22, max_in_flight_bytes=2**24),
]

HEAD = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\n"
SMALL = HEAD + b"Content-Length: 5\r\n\r\nsmall"


def body_of(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def request_of(body: bytes, more: bytes = b"") -> bytes:
    return HEAD + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


BODY = body_of(3 * TURN + 5)


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read has put where the body is to lie."""
    counts: list[int] = []
    updated = Intake.buffer_updated

    def count(self: Intake, nbytes: int) -> None:
        counts.append(nbytes)
        updated(self, nbytes)

    monkeypatch.setattr(Intake, "buffer_updated", count)
    return counts


def arena_of(rig: Rig) -> Arena:
    arena = rig.registry.find("m").dispatcher.arena
    assert arena is not None
    return arena


async def same(answer: Awaitable[tuple[int, bytes, bytes]], body: bytes) -> bool:
    """Whether an echo is what was sent; a comparison of megabytes by pytest would take minutes."""
    status, _, got = await answer
    return status == 200 and got == body


async def test_most_of_a_large_body_goes_past_the_parser(
    rig: Rig, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    intakes: list[Intake] = []
    take = Intake.take

    async def keep(self: Intake) -> None:
        intakes.append(self)
        await take(self)

    monkeypatch.setattr(Intake, "take", keep)
    async with rig.client() as client:
        for _ in range(3):
            client.send(request_of(BODY))
            assert await same(client.answer(), BODY)
        assert sum(taken) > 2 * len(BODY)
        assert max(taken) <= STEP
    assert [intake._rest.obj for intake in intakes] == [b""] * 3  # the loop may keep them, and they not the memory


@pytest.mark.parametrize("size", [WORTH - 1, WORTH, SHARE_FROM, SHARE_FROM + 1, TURN, TURN + 1])
async def test_bodies_of_all_sizes_in_pieces_of_all_sizes(rig: Rig, size: int) -> None:
    body = body_of(size)
    async with rig.client() as client:
        for piece in (size, 65_537, 9_999):
            data = request_of(body)
            for start in range(0, len(data), piece):
                client.send(data[start : start + piece])
                await asyncio.sleep(0)
            assert await same(client.answer(), body)


@pytest.mark.parametrize(
    "behind",
    [
        SMALL,
        SMALL + SMALL + request_of(BODY) + SMALL,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nsmall\r\n0\r\n\r\n",
        b"\r\n" + SMALL,
    ],
    ids=["small", "several", "chunked", "empty line"],
)
async def test_what_comes_behind_a_body_is_the_next_request(rig: Rig, taken: list[int], behind: bytes) -> None:
    async with rig.client() as client:
        client.send(request_of(BODY) + behind)
        assert await same(client.answer(), BODY)
        for count in range(behind.count(HEAD)):
            assert await same(client.answer(), BODY if count == 2 else b"small")
        client.send(SMALL)
        assert await same(client.answer(), b"small")
    assert sum(taken) > len(BODY) // 2


async def test_garbage_behind_a_body_is_a_400_behind_its_answer(rig: Rig, taken: list[int]) -> None:
    async with rig.client() as client:
        client.send(request_of(BODY) + b"no HTTP\r\n\r\n")
        assert await same(client.answer(), BODY)
        assert (await client.answer())[0] == 400
        assert await client.rest() == b""
    assert taken


async def test_behind_the_last_request_of_a_connection_nothing_is_looked_at(rig: Rig, taken: list[int]) -> None:
    async with rig.client() as client:
        client.send(request_of(BODY, b"Connection: close\r\n") + SMALL)
        assert await same(client.answer(), BODY)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await client.reader.readexactly(1)
    assert taken
    assert len(rig.lane.requests) == 1


async def test_a_client_that_asks_first_is_told_to_send_its_body(rig: Rig, taken: list[int]) -> None:
    async with rig.client() as client:
        client.send(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
        assert (await client.answer())[0] == 100
        client.send(BODY)
        assert await same(client.answer(), BODY)
    assert sum(taken) == len(BODY)


async def test_a_body_over_the_limit_is_not_taken(rig: Rig, taken: list[int]) -> None:
    async with rig.client() as client:
        client.send(HEAD + b"Content-Length: %d\r\n\r\n" % 2**23)
        assert (await client.answer())[0] == 413
    assert not taken
    assert arena_of(rig).used == 0


async def test_a_client_that_ends_its_direction_behind_its_body_gets_its_answer(rig: Rig, taken: list[int]) -> None:
    async with rig.client() as client:
        client.send(request_of(BODY))
        client.writer.write_eof()
        while (answer := await client.answer())[0] == 100:
            pass
        assert answer[0] == 200
        assert len(answer[2]) == len(BODY)
    assert taken


async def half_of_a_body(rig: Rig, client: Raw, taken: list[int], body: bytes = BODY) -> None:
    client.send(request_of(body)[: -(len(body) // 2)])
    await until(lambda: sum(taken) and arena_of(rig).used)


async def cut_short(client: Raw) -> None:
    client.writer.write_eof()
    status, _, body = await client.answer()
    assert status == 400
    assert b"the connection ended before the body did" in body
    assert await client.rest() == b""


async def left(client: Raw) -> None:
    client.reset()


@pytest.mark.parametrize("leave", [cut_short, left])
async def test_a_client_that_leaves_amid_its_body_holds_nothing(
    rig: Rig, taken: list[int], leave: Callable[[Raw], Awaitable[None]]
) -> None:
    async with rig.client() as client:
        await half_of_a_body(rig, client, taken)
        await leave(client)
        await until(lambda: not rig.connections.connections)
    assert arena_of(rig).used == 0
    assert rig.in_flight.used == 0
    assert not rig.lane.requests


async def test_the_end_of_a_server_does_not_wait_for_a_body(rig: Rig, taken: list[int]) -> None:
    async with rig.client() as client:
        await half_of_a_body(rig, client, taken)
        ending = asyncio.create_task(rig.inference.close())
        assert (await client.answer())[0] == 503
        assert await client.rest() == b""
        await ending
    assert arena_of(rig).used == 0
    assert rig.in_flight.used == 0


async def test_nothing_is_written_to_memory_that_was_given_back(rig: Rig, taken: list[int]) -> None:
    """The request is cancelled while its client goes on to send."""
    async with rig.client() as client:
        await half_of_a_body(rig, client, taken)
        (one,) = rig.connections.connections
        transport = one.transport
        assert transport is not None
        assert isinstance(transport.get_protocol(), Intake)
        request = one._current_request
        assert request is not None
        request.task.cancel()
        client.send(BODY[len(BODY) // 2 :])
        await until(lambda: arena_of(rig).used == 0)
        assert transport.get_protocol() is one
        before = sum(taken)
        await until(lambda: not rig.connections.connections)
        assert sum(taken) == before


async def test_a_large_body_leaves_others_their_turn(rig: Rig, taken: list[int]) -> None:
    """All of it may lie in the socket already: no more than a turn's bytes are taken with nobody else looked at."""
    turns: list[int] = []
    looking = True

    async def look() -> None:
        while looking:
            turns.append(sum(taken))
            await asyncio.sleep(0)

    async with rig.client() as client:
        other = asyncio.create_task(look())
        client.send(request_of(BODY))
        assert await same(client.answer(), BODY)
        looking = False
        await other
    assert max(after - before for before, after in itertools.pairwise(turns)) < TURN + STEP


async def test_bodies_of_many_clients_are_not_mixed_up(rig: Rig, taken: list[int]) -> None:
    """Some leave amid a body, some send in pieces; the memory of one is the next one's."""
    chance = random.Random(1)

    async def be_client(name: int) -> None:
        for number in range(6):
            async with rig.client() as client:
                for again in range(2):
                    body = bytes([name, number, again]) * chance.randrange(20_000, 300_000)
                    data = request_of(body)
                    piece = chance.choice([len(data), 50_000, 200_000])
                    if chance.random() < 0.2:
                        client.send(data[: len(data) * 2 // 3])
                        await client.writer.drain()
                        client.reset()
                        break
                    for start in range(0, len(data), piece):
                        client.send(data[start : start + piece])
                        await asyncio.sleep(0)
                    assert await same(client.answer(), body)

    await asyncio.gather(*map(be_client, range(8)))
    await until(lambda: not rig.connections.connections)
    assert taken
    assert arena_of(rig).used == 0
    assert rig.in_flight.used == 0


async def test_tls(rig: Rig, taken: list[int]) -> None:
    identity = read_identity(ServerOptions())
    loop = asyncio.get_running_loop()
    server = await loop.create_server(rig.connections, "127.0.0.1", 0, ssl=tls_context(identity))
    trusting = ssl.create_default_context(cadata=identity.certificate.decode())
    port = server.sockets[0].getsockname()[1]
    client = Raw(*await asyncio.open_connection("localhost", port, ssl=trusting, limit=2**23))
    try:
        client.send(request_of(BODY) + SMALL)
        assert await same(client.answer(), BODY)
        assert await same(client.answer(), b"small")
        assert sum(taken) > len(BODY) // 2
    finally:
        client.writer.transport.abort()
        server.close()
        await until(lambda: not rig.connections.connections)
