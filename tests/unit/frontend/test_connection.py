"""Clients that are slow, that leave, and that send no HTTP. A body is the affair of test_body."""

import asyncio
import json
from collections.abc import Callable

import pytest
from aiohttp.web_protocol import _ErrInfo

from minserve.dispatch.request import Request
from minserve.frontend.connection import MAX_OVERHEAD, PIPELINED, Connection
from minserve.frontend.heads import MAX_HEAD
from minserve.wire.messages import Answer
from tests.unit.frontend.rig import OPTIONS, Raw, Rig, with_options
from tests.unit.worker.specs import until

pytestmark = [pytest.mark.asyncio, pytest.mark.parametrize("express", [True, False], ids=["express", "aiohttp"])]

HEADER_S, KEEPALIVE_S, BODY_S = OPTIONS.header_timeout, OPTIONS.keepalive_timeout, OPTIONS.body_timeout
PING = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\n"
POST = HEAD + b"Content-Length: 0\r\n\r\n"
SLOW = POST.replace(b"/m ", b"/m/ ")  # nothing for the express
CLOSE = HEAD + b"Content-Length: 0\r\nConnection: close\r\n\r\n"


def message_of(answer: tuple[int, bytes, bytes]) -> str:
    """Of an answer that must be an error in our form, and the connection's last."""
    status, head, body = answer
    error = json.loads(body)
    assert error["code"] == status
    for line in (b"Connection: close", b"Server: minserve", b"Content-Type: application/json"):
        assert b"\r\n" + line + b"\r\n" in head
    assert b"\r\nx-request-id: " in head
    return str(error["message"])


def head_sizes(rig: Rig) -> list[int]:
    return [one._head_size for one in rig.connections.connections if isinstance(one, Connection)]


async def arrived(rig: Rig, size: int) -> None:
    """Waits until the only connection has so many bytes of a head."""
    await until(lambda: head_sizes(rig) == [size])


# ── heads that do not end, and connections without any ──


async def test_a_head_that_does_not_end_is_a_408_however_busily_it_comes(rig: Rig) -> None:
    async with rig.client() as client:
        client.send(b"GET /")
        await arrived(rig, 5)
        await rig.pass_time(HEADER_S - 1)
        client.send(b"p")
        await arrived(rig, 6)
        await rig.pass_time(1)
        answer = await client.answer()
        assert answer[0] == 408
        assert message_of(answer) == "the head of the request took longer than header_timeout (30 s)"
        assert await client.rest() == b""
    await until(lambda: not rig.connections.connections)


async def test_a_head_that_begins_before_the_connection_is_waited_on_is_a_408_too(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sends at once may be faster than the first step of aiohttp's task."""
    made = Connection.connection_made

    def made_with_bytes(connection: Connection, transport: asyncio.BaseTransport) -> None:
        made(connection, transport)
        connection.data_received(b"GET /")

    monkeypatch.setattr(Connection, "connection_made", made_with_bytes)
    async with rig.client() as client:
        await arrived(rig, 5)
        await rig.pass_time(HEADER_S)
        assert (await client.answer())[0] == 408
        assert await client.rest() == b""


async def test_a_head_that_begins_while_a_request_is_at_work_is_a_408_once_that_is_answered(
    rig: Rig, held: list[Request]
) -> None:
    async with rig.client() as client:
        client.send(SLOW)
        await until(lambda: held)
        client.send(b"GET /")
        await arrived(rig, 5)
        held[0].answer(Answer(0, 4), b"late")
        assert (await client.answer())[0] == 200
        await rig.pass_time(HEADER_S)
        assert (await client.answer())[0] == 408
        assert await client.rest() == b""


async def test_empty_lines_are_no_head_that_is_late(rig: Rig) -> None:
    """Some clients send one behind a body; a 408 for it would be taken for the answer to the next request."""
    async with rig.client() as client:
        await until(lambda: rig.connections.connections)
        (connection,) = rig.connections.connections
        connection.data_received(b"\r\n")
        await rig.pass_time(HEADER_S)
        assert await client.rest() == b""


async def test_a_connection_that_never_sends_a_byte_is_closed_without_a_word(rig: Rig) -> None:
    """An answer to nothing would be taken for one to the request that is just under way."""
    async with rig.client() as client:
        await until(lambda: rig.connections.connections)
        await rig.pass_time(HEADER_S - 1)
        assert rig.connections.connections
        await rig.pass_time(1)
        assert await client.rest() == b""


async def test_an_idle_connection_is_closed_after_keepalive_timeout(rig: Rig) -> None:
    async with rig.client() as client:
        for _ in range(3):  # each request gives it a new one
            client.send(PING)
            assert (await client.answer())[0] == 200
            await rig.pass_time(KEEPALIVE_S - 1)
        await rig.pass_time(1)
        assert await client.rest() == b""
    await until(lambda: not rig.connections.connections)


async def test_the_second_head_has_header_timeout_from_its_first_byte(rig: Rig) -> None:
    async with rig.client() as client:
        client.send(PING)
        assert (await client.answer())[0] == 200
        await rig.pass_time(KEEPALIVE_S - 1)
        client.send(b"GET /")
        await arrived(rig, 5)
        await rig.pass_time(HEADER_S - 1)
        assert rig.connections.connections
        await rig.pass_time(1)
        assert (await client.answer())[0] == 408
        assert await client.rest() == b""


async def test_a_connection_at_work_has_all_the_time_that_the_model_needs(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(POST)
        await until(lambda: held)
        await rig.pass_time(10 * (HEADER_S + KEEPALIVE_S + BODY_S))
        held[0].answer(Answer(0, 2), b"ok")
        assert (await client.answer())[::2] == (200, b"ok")


# ── clients that do not read ──


async def test_a_client_that_takes_nothing_of_its_answer_is_dropped(rig: Rig, held: list[Request]) -> None:
    async with rig.client(receive_buffer=4096) as client:
        client.send(POST)
        await until(lambda: held)
        held[0].answer(Answer(0, 20_000_000), b"x" * 20_000_000)
        (one,) = rig.connections.connections
        await until(lambda: one.writing_paused)
        await rig.pass_time(BODY_S - 1)
        assert rig.connections.connections
        await rig.pass_time(1)
        await until(lambda: not rig.connections.connections)


@pytest.mark.parametrize("last", [POST, CLOSE])
async def test_a_closed_connection_whose_client_does_not_read_does_not_stay(
    rig: Rig, held: list[Request], last: bytes
) -> None:
    """Closing waits for what is written and not taken yet, without a limit of its own."""
    async with rig.client(receive_buffer=4096) as client:
        client.send(last)
        await until(lambda: held)
        (one,) = rig.connections.connections
        transport = rig.connections._connections[one]
        transport.set_write_buffer_limits(high=2**30)  # as if the rest were so small that nobody waits for it
        held[0].answer(Answer(0, 20_000_000), b"x" * 20_000_000)
        await until(lambda: transport.is_closing() if last == CLOSE else one._waiter is not None)
        if last == POST:
            await rig.pass_time(KEEPALIVE_S)
            assert transport.is_closing()
        await rig.pass_time(BODY_S - 1)
        assert rig.connections.connections
        await rig.pass_time(1)
        await until(lambda: not rig.connections.connections)


# ── several requests at once ──


async def test_pipelined_requests_are_answered_in_their_order_one_at_a_time(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(POST * 3)
        for number in range(3):
            await until(lambda: held)
            held.pop().answer(Answer(0, 1), b"%d" % number)
            assert not held
            assert (await client.answer())[::2] == (200, b"%d" % number)


async def test_more_pipelined_requests_than_may_wait_are_all_answered(rig: Rig) -> None:
    async with rig.client() as client:
        client.send(b"".join(HEAD + b"Content-Length: 3\r\n\r\n%03d" % number for number in range(200)))
        for number in range(200):
            assert (await client.answer())[::2] == (200, b"%03d" % number)


@with_options(max_request_size=200_000, max_in_flight_bytes=10**6)
async def test_what_is_sent_behind_a_request_at_work_is_not_all_taken(rig: Rig, held: list[Request]) -> None:
    """Its bodies are in no count, and would be read into memory for as long as that request waits."""
    body = b"x" * 100_000
    async with rig.client() as client:
        client.send((HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) * 50)
        await until(lambda: held)
        (one,) = rig.connections.connections
        await until(lambda: one._buffer_paused)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert len(one._messages) < 2 * PIPELINED
        rig.lane.handle = lambda request: request.answer(Answer(0, 0), b"")
        held[0].answer(Answer(0, 0), b"")
        for _ in range(50):
            assert (await client.answer())[0] == 200


async def test_a_request_at_work_is_answered_before_the_garbage_behind_it(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(POST)
        await until(lambda: held)
        (one,) = rig.connections.connections
        client.send(b"\x00\x01\x02\r\n\r\n" + POST)
        await until(lambda: one._messages)
        one.data_received(b"\x00 and so on\r\n\r\n" + POST)
        assert len(one._messages) == 1, "it is not looked at"
        held[0].answer(Answer(0, 0), b"")
        assert (await client.answer())[0] == 200
        answer = await client.answer()
        assert answer[0] == 400
        assert message_of(answer).startswith("bad request: ")
        assert await client.rest() == b""
    assert len(rig.lane.requests) == 1


# ── heads that are too large ──


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"X: " + b"a" * 9000 + b"\r\n", "a line of the request's head is over 8190 bytes"),
        (b"X: a\r\n" * 200, "Too many headers received"),
        ((b"X: " + b"a" * 8000 + b"\r\n") * 9, f"the head of the request is over {MAX_HEAD} bytes"),
    ],
)
@pytest.mark.parametrize("ends", [True, False])
async def test_a_head_that_is_too_large_is_a_431(rig: Rig, head: bytes, message: str, ends: bool) -> None:
    async with rig.client() as client:
        client.send(b"GET /ping HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n" * ends)
        answer = await client.answer()
        assert answer[0] == 431
        assert message in message_of(answer)
        assert await client.rest() == b""


@pytest.mark.parametrize("pieces", [1, 3, 100])
async def test_a_large_head_within_the_limit_is_taken_however_it_comes(rig: Rig, pieces: int) -> None:
    head = b"GET /ping HTTP/1.1\r\nHost: x\r\n" + (b"X: " + b"a" * 8000 + b"\r\n") * 8 + b"\r\n"
    assert MAX_HEAD - 2000 < len(head) < MAX_HEAD
    async with rig.client() as client:
        await send_in_pieces(rig, client, head, pieces)
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize("pieces", [1, 3, 100])
async def test_a_head_over_the_limit_is_refused_however_it_comes(rig: Rig, pieces: int) -> None:
    head = PING[:-2] + (b"X: " + b"a" * 8000 + b"\r\n") * 8 + b"Y: " + b"a" * 1600 + b"\r\n\r\n"
    assert MAX_HEAD < len(head) < MAX_HEAD + 1000
    async with rig.client() as client:
        await send_in_pieces(rig, client, head, pieces)
        assert (await client.answer())[0] == 431
        assert await client.rest() == b""


async def test_a_request_before_a_head_that_is_too_large_is_answered(rig: Rig) -> None:
    async with rig.client() as client:
        client.send(POST + PING[:-2] + (b"X: " + b"a" * 8000 + b"\r\n") * 9 + b"\r\n" + POST)
        assert (await client.answer())[0] == 200
        assert (await client.answer())[0] == 431
        assert await client.rest() == b""
    assert len(rig.lane.requests) == 1


async def send_in_pieces(rig: Rig, client: Raw, data: bytes, pieces: int) -> None:
    size = -(-len(data) // pieces)
    for start in range(0, len(data), size):
        client.send(data[start : start + size])
        if start + size < len(data):
            await arrived(rig, start + size)


# ── what the parser lets pass ──


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"GET /ping\r\n\r\n", 505, "HTTP/0.9: allowed are 1.0 and 1.1"),
        (b"GET /ping HTTP/2.0\r\nHost: x\r\n\r\n", 505, "HTTP/2.0: allowed are 1.0 and 1.1"),
        (
            b"POST /predictions/m HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            + POST,
            400,
            "bad request: Transfer-Encoding in HTTP/1.0",
        ),
    ],
)
@pytest.mark.parametrize("before", [b"", POST])
async def test_other_versions_are_refused_and_what_follows_is_no_request(
    rig: Rig, before: bytes, data: bytes, status: int, message: str
) -> None:
    async with rig.client() as client:
        client.send(before + data)
        if before:
            assert (await client.answer())[0] == 200
        answer = await client.answer()
        assert answer[0] == status
        assert message_of(answer) == message
        assert await client.rest() == b""
    assert len(rig.lane.requests) == bool(before)


async def test_more_around_the_chunks_than_in_them_is_a_400(rig: Rig) -> None:
    """It would come for nothing, uncounted, for as long as body_timeout allows."""
    async with rig.client() as client:
        client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;")
        await until(lambda: rig.connections.requests_count)
        client.send(b"a" * (MAX_OVERHEAD + 1000))
        answer = await client.answer()
        assert answer[0] == 400
        assert b"\r\nConnection: close\r\n" in answer[1]
        assert b"0 bytes of the body came in more than 52" in answer[2]
        assert await client.rest() == b""
    assert rig.lane.requests == []


@with_options(max_request_size=100_000, max_in_flight_bytes=100_000)
async def test_chunks_of_one_byte_are_taken(rig: Rig) -> None:
    async with rig.client() as client:
        client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        await until(lambda: rig.connections.requests_count)
        client.send(b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n")
        assert (await client.answer())[::2] == (200, b"x" * 100_000)


# ── bodies that break off, and clients that leave in the wrong moment ──


async def test_a_body_that_ends_too_early_spoils_only_its_own_request(rig: Rig) -> None:
    async with rig.client() as client:
        client.send(POST + HEAD + b"Content-Length: 3\r\n\r\na")
        client.writer.write_eof()
        assert (await client.final_answer())[0] == 200
        answer = await client.final_answer()
        assert answer[0] == 400
        assert message_of(answer) == "the connection ended before the body did"
        assert await client.rest() == b""
    assert len(rig.lane.requests) == 1


@pytest.mark.parametrize(
    "second",
    [
        HEAD + b"Content-Length: 3\r\n\r\na",
        HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n3\r\nab",  # refused already
    ],
)
async def test_a_body_that_ends_too_early_does_not_spoil_the_request_at_work(
    rig: Rig, held: list[Request], second: bytes
) -> None:
    async with rig.client() as client:
        client.send(POST)
        await until(lambda: held)
        (one,) = rig.connections.connections
        client.send(second)
        await until(lambda: one._messages)
        client.writer.write_eof()
        assert (await client.answer())[0] == 100
        held[0].answer(Answer(0, 2), b"ok")
        assert (await client.final_answer())[::2] == (200, b"ok")
        assert (await client.final_answer())[0] == 400
        assert await client.rest() == b""


async def test_a_bad_chunk_spoils_only_its_own_request(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(POST)
        await until(lambda: held)
        (one,) = rig.connections.connections
        client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nab")
        await until(lambda: one._messages)
        client.send(b"cd\r\n")
        await until(lambda: isinstance(one._messages[0][0], _ErrInfo))
        held[0].answer(Answer(0, 2), b"ok")
        assert (await client.answer())[::2] == (200, b"ok")
        assert (await client.answer())[0] == 400
        assert await client.rest() == b""
    assert len(held) == 1


@pytest.mark.parametrize("more", [b"", b"zz\r\n"], ids=["eof", "bad chunk"])
async def test_a_refused_body_that_breaks_off_ends_the_connection_at_once(
    rig: Rig, more: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig.client() as client:
        client.send(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        assert (await client.answer())[0] == 404
        if more:
            client.send(more)
        else:
            client.writer.write_eof()
        async with asyncio.timeout(4):  # LINGER_S is 5
            assert await client.reader.read() == b""
    assert caplog.records == []


async def taken_up(one: Connection, data: bytes) -> None:
    """Lets a connection receive the beginning of a request; aiohttp has then taken it up, and not begun with it."""
    await until(lambda: one._waiter is not None)
    one.data_received(data)
    await asyncio.sleep(0)
    assert (one._waiter, one._current_request, len(one._messages)) == (None, None, 0)


@pytest.mark.parametrize(
    "breaks", [Connection.eof_received, lambda one: one.data_received(b"zz\r\n")], ids=["eof", "bad chunk"]
)
async def test_a_body_that_breaks_off_just_when_its_request_is_taken_up_is_a_400(
    rig: Rig, breaks: Callable[[Connection], object]
) -> None:
    async with rig.client() as client:
        await until(lambda: rig.connections.connections)
        (one,) = rig.connections.connections
        assert isinstance(one, Connection)
        await taken_up(one, HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        breaks(one)
        assert (await client.answer())[0] == 400
        assert await client.rest() == b""
    assert rig.lane.requests == []


async def test_a_client_that_leaves_just_when_its_request_is_taken_up_leaves_the_queue(rig: Rig) -> None:
    dispatcher = rig.add("slow")
    async with rig.client() as client:
        await until(lambda: rig.connections.connections)
        (one,) = rig.connections.connections
        assert isinstance(one, Connection)
        await taken_up(one, POST.replace(b"/m", b"/slow"))
        client.writer.close()
        one.eof_received()
        await until(lambda: not rig.connections.connections)
    assert dispatcher.queued == 0


async def test_a_client_that_leaves_just_behind_its_answer_is_closed(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(SLOW)
        await until(lambda: held)
        (one,) = rig.connections.connections
        held[0].answer(Answer(0, 2), b"ok")
        await asyncio.sleep(0)
        assert (one._current_request, one._request_in_progress, one._waiter) == (None, False, None)
        one.eof_received()
        assert (await client.answer())[::2] == (200, b"ok")
        assert await client.rest() == b""


async def test_no_client_can_write_to_the_log(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever likes can send garbage as fast as the network carries it."""
    for garbage in (b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", HEAD + b"nonsense\r\n\r\n"):
        async with rig.client() as client:
            client.send(garbage)
            assert (await client.answer())[0] == 400
            assert await client.rest() == b""
    assert caplog.records == []
