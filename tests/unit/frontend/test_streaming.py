import asyncio
from types import SimpleNamespace
from typing import cast

import aiohttp
import pytest
from aiohttp.http import StreamWriter

from minserve.dispatch.request import Request, Stream
from minserve.errors import WorkerFailed
from minserve.frontend.connection import STREAM_AHEAD, Connection
from minserve.wire.messages import Answer, Buffer
from tests.unit.frontend.rig import OPTIONS, Rig
from tests.unit.worker.specs import until

pytestmark = [pytest.mark.asyncio, pytest.mark.parametrize("express", [True, False], ids=["express", "aiohttp"])]

HEADERS = (("Content-Type", "text/event-stream"), ("X-Model", "m"))
ROOM = 100_000
STALL_S = 30.0  # the default
POST = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
POST_CLOSE = POST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
POST_1_0 = b"POST /predictions/m HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"


def send(request: Request, body: Buffer, answer: Answer | None = None) -> None:
    """Rank 0's next chunk."""
    request.chunk(answer or Answer(0, len(body)), body, ROOM, lambda: None)


def end(request: Request, body: bytes = b"") -> None:
    request.answer(Answer(0, len(body)), body)


async def test_each_chunk_leaves_at_once_and_then_comes_the_end(rig: Rig, held: list[Request]) -> None:
    post = asyncio.create_task(rig.inference.post("/predictions/m", data=b""))
    await until(lambda: held)
    send(held[0], b"one", Answer(0, 3, 201, "Streaming", HEADERS))
    async with asyncio.timeout(10), await post as response:
        assert (response.status, response.reason) == (201, "Streaming")
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["X-Model"] == "m"
        assert response.headers["Transfer-Encoding"] == "chunked"
        assert response.headers["x-request-id"] == held[0].meta.id
        assert await response.content.readany() == b"one"
        for chunk in (b"two", b"three"):
            send(held[0], chunk)
            assert await response.content.readany() == chunk
        end(held[0], b"last")
        assert await response.content.read() == b"last"


async def test_a_chunk_of_nothing_does_not_end_the_stream(rig: Rig, held: list[Request]) -> None:
    post = asyncio.create_task(rig.inference.post("/predictions/m", data=b""))
    await until(lambda: held)
    for chunk in (b"", b"one", b"", memoryview(b"two")):
        send(held[0], chunk)
    end(held[0])
    async with asyncio.timeout(10), await post as response:
        assert await response.read() == b"onetwo"
        assert "Content-Type" not in response.headers


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (b"", b"3\r\none\r\n4\r\ntwo\n\r\n1\r\n3\r\n4\r\nlast\r\n0\r\n\r\n"),
        (
            b"Accept: text/event-stream\r\n",
            b"b\r\ndata: one\n\n\r\n12\r\ndata: two\ndata: \n\n\r\n"
            b"9\r\ndata: 3\n\n\r\nc\r\ndata: last\n\n\r\n0\r\n\r\n",
        ),
    ],
    ids=["bytes", "events"],
)
async def test_chunks_that_have_come_together_stay_chunks_of_their_own_and_in_order(
    rig: Rig, held: list[Request], accept: bytes, expected: bytes
) -> None:
    post = asyncio.create_task(rig.raw(POST_CLOSE.replace(b"Host: x\r\n", b"Host: x\r\n" + accept)))
    await until(lambda: held)
    for chunk in (b"one", b"", bytearray(b"two\n"), memoryview(b"3")):
        send(held[0], chunk)
    end(held[0], b"last")
    status, _, rest = await post
    assert (status, rest) == (200, expected)


async def test_chunks_that_have_come_together_go_out_with_one_write(
    rig: Rig, held: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    plain = StreamWriter.write

    async def write(writer: StreamWriter, chunk: Buffer, **options: bool) -> None:
        written.append(len(chunk))
        await plain(writer, chunk, **options)

    monkeypatch.setattr(StreamWriter, "write", write)
    post = asyncio.create_task(rig.raw(POST_CLOSE))
    await until(lambda: held)
    for _ in range(1000):
        send(held[0], b"x" * 100)
    end(held[0])
    assert (await post)[2] == b"64\r\n%b\r\n" % (b"x" * 100) * 1000 + b"0\r\n\r\n"
    assert max(written) < 2 * STREAM_AHEAD, "no more than a client may have waiting"
    assert len(written) < 20


async def test_chunks_with_an_error_behind_them_come_first(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(POST)
        await until(lambda: held)
        for chunk in (b"one", b"two"):
            send(held[0], chunk)
        held[0].fail(WorkerFailed("m/0: rank 1 died"))
        assert (await client.rest()).endswith(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n")


async def test_an_http_1_0_client_gets_the_bytes_and_a_closed_connection(rig: Rig, held: list[Request]) -> None:
    post = asyncio.create_task(rig.raw(POST_1_0))
    await until(lambda: held)
    for chunk in (b"one", b"two"):
        send(held[0], chunk)
    end(held[0])
    status, head, rest = await post
    assert (status, rest) == (200, b"onetwo")
    assert b"chunked" not in head.lower()


@pytest.mark.parametrize("name", ["Content-Length", "Transfer-Encoding"])
async def test_a_handlers_header_cannot_break_the_framing_of_its_stream(
    rig: Rig, held: list[Request], name: str
) -> None:
    post = asyncio.create_task(rig.raw(POST_CLOSE))
    await until(lambda: held)
    send(held[0], b"one", Answer(0, 3, 200, "", ((name, "1"),)))
    end(held[0])
    status, head, rest = await post
    assert (status, rest) == (200, b"3\r\none\r\n0\r\n\r\n")
    assert b"content-length" not in head.lower()
    assert head.lower().count(b"transfer-encoding: chunked") == 1


async def test_a_stream_whose_status_allows_no_body_sends_none(rig: Rig, held: list[Request]) -> None:
    """Its bytes would be taken for the beginning of the next answer on the connection."""
    post = asyncio.create_task(rig.raw(POST_CLOSE))
    await until(lambda: held)
    send(held[0], b"one", Answer(0, 3, 204))
    end(held[0])
    status, _, rest = await post
    assert (status, rest) == (204, b"")


# ── a stream that breaks off ──


async def test_a_stream_that_breaks_off_does_not_look_whole(
    rig: Rig, held: list[Request], caplog: pytest.LogCaptureFixture
) -> None:
    post = asyncio.create_task(rig.inference.post("/predictions/m", data=b""))
    await until(lambda: held)
    send(held[0], b"one")
    async with asyncio.timeout(10), await post as response:
        assert await response.content.readany() == b"one"
        held[0].fail(WorkerFailed("m/0: rank 1 died"))
        with pytest.raises(aiohttp.ClientError):
            await response.content.read()
    assert "/predictions/m: stream broken off: m/0: rank 1 died" in caplog.text


async def test_a_stream_that_breaks_off_has_no_last_chunk_and_no_next_answer(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(POST + POST)
        await until(lambda: held)
        send(held[0], b"one")
        assert await client.reader.readuntil(b"3\r\none\r\n")
        held[0].fail(WorkerFailed("m/0: rank 1 died"))
        assert await client.rest() == b""
    assert len(held) == 1


async def test_an_http_1_0_client_sees_a_reset_where_a_stream_breaks_off(rig: Rig, held: list[Request]) -> None:
    """For it an ordinary end of the connection would be the end of the answer."""
    async with rig.client() as client:
        client.send(POST_1_0)
        await until(lambda: held)
        send(held[0], b"one")
        assert await client.reader.readuntil(b"one")
        held[0].fail(WorkerFailed("m/0: rank 1 died"))
        with pytest.raises(ConnectionResetError):
            await client.rest()


async def test_an_unforeseen_error_puts_no_second_answer_into_the_stream(
    rig: Rig, held: list[Request], caplog: pytest.LogCaptureFixture
) -> None:
    async with rig.client() as client:
        client.send(POST)
        await until(lambda: held)
        send(held[0], b"one")
        assert await client.reader.readuntil(b"3\r\none\r\n")
        held[0].fail(KeyError("a bug of ours"))
        assert await client.rest() == b""
    assert "a bug of ours" in caplog.text


# ── server-sent events ──


POST_SSE = POST.replace(b"\r\n\r\n", b"\r\nAccept: text/event-stream\r\n\r\n")


def with_type(kind: str) -> Answer:
    return Answer(0, 0, 200, "", (("Content-Type", kind),) if kind else ())


async def answer_to(
    rig: Rig, held: list[Request], accept: str | None, kind: str, chunks: list[bytes]
) -> tuple[str, bytes]:
    headers = {} if accept is None else {"Accept": accept}
    post = asyncio.create_task(rig.inference.post("/predictions/m", data=b"", headers=headers))
    await until(lambda: held)
    for chunk in chunks:
        send(held[0], chunk, with_type(kind))
    end(held[0], b"last")
    async with asyncio.timeout(10), await post as response:
        return response.headers.get("Content-Type", ""), await response.read()


@pytest.mark.parametrize(
    "accept", ["text/event-stream", "application/json, Text/Event-Stream;q=0.5", "text/event-stream;q=0.01"]
)
@pytest.mark.parametrize("kind", ["", "application/json", "text/plain; charset=utf-8", "application/x-ndjson"])
async def test_each_chunk_of_text_is_an_event_to_a_client_that_asks_for_them(
    rig: Rig, held: list[Request], accept: str, kind: str
) -> None:
    got = await answer_to(rig, held, accept, kind, [b"one", b"", b"two\n", b"a\r\nb\rc", "é".encode()])
    assert got == (
        "text/event-stream",
        "data: one\n\ndata: two\ndata: \n\ndata: a\ndata: b\ndata: c\n\ndata: é\n\ndata: last\n\n".encode(),
    )


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "text/plain"),
        ("*/*", ""),
        ("text/event-stream;q=0, */*", "text/plain"),
        ("text/event-stream-like", "text/plain"),
        ("text/event-stream", "image/png"),
        ("text/event-stream", "application/octet-stream"),
        ("text/event-stream", "text/event-stream; charset=utf-8"),
    ],
)
async def test_other_chunks_stay_as_they_are(rig: Rig, held: list[Request], accept: str | None, kind: str) -> None:
    """Nobody has asked for events, or they are none that could be made of the bytes, or the handler makes them itself."""
    assert await answer_to(rig, held, accept, kind, [b"data: 1\n\n"]) == (kind, b"data: 1\n\nlast")


async def test_an_answer_in_one_piece_is_no_stream_of_events(rig: Rig) -> None:
    async with rig.inference.post("/predictions/m", data=b"1", headers={"Accept": "text/event-stream"}) as response:
        assert (await response.read(), response.headers.get("Content-Type")) == (b"1", None)


@pytest.mark.parametrize("made_by_handler", [False, True])
async def test_a_stream_of_events_that_breaks_off_says_so_and_has_no_end(
    rig: Rig, held: list[Request], made_by_handler: bool
) -> None:
    async with rig.client() as client:
        client.send(POST if made_by_handler else POST_SSE)
        await until(lambda: held)
        kind = "text/event-stream" if made_by_handler else "application/json"
        send(held[0], b"data: 1\n\n" if made_by_handler else b"1", with_type(kind))
        assert await client.reader.readuntil(b"\r\ndata: 1\n\n\r\n")
        held[0].fail(WorkerFailed("m/0: rank 1 died"))
        size, _, event = (await client.rest()).partition(b"\r\n")
    assert event.removeprefix(b"\n\n") == (
        b'event: error\ndata: {"code": 503, "type": "InternalServerException", "message": "m/0: rank 1 died"}\n\n\r\n'
    )
    assert int(size, 16) == len(event) - 2


async def test_an_http_1_0_client_gets_the_error_as_an_event_too(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(POST_SSE.replace(b"HTTP/1.1", b"HTTP/1.0"))
        await until(lambda: held)
        send(held[0], b"1")
        assert await client.reader.readuntil(b"data: 1\n\n")
        held[0].fail(WorkerFailed("m/0: rank 1 died"))
        assert (await client.rest()).startswith(b"event: error\ndata: {")


async def test_a_client_of_events_that_left_before_the_error_is_no_trouble(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(POST_SSE)
        await until(lambda: held)
        send(held[0], b"1")
        assert await client.reader.readuntil(b"data: 1\n\n")
        client.reset()
        held[0].fail(WorkerFailed("m/0: rank 1 died"))
        await until(lambda: not rig.connections.connections)


# ── a client that leaves, or does not read ──


async def test_a_client_that_leaves_mutes_its_stream_and_nothing_is_logged(
    rig: Rig, held: list[Request], caplog: pytest.LogCaptureFixture
) -> None:
    post = asyncio.create_task(rig.inference.post("/predictions/m", data=b""))
    await until(lambda: held)
    send(held[0], b"one")
    response = await post
    stream = held[0].stream
    assert stream is not None
    response.close()
    for _ in range(50):
        send(held[0], b"more")
        await asyncio.sleep(0)
    await until(lambda: stream.muted)
    end(held[0])
    assert caplog.records == []
    assert rig.registry.find("m").dispatcher._live == set()


def connection_of(rig: Rig) -> Connection:
    (connection,) = rig.connections.connections
    return cast("Connection", connection)


async def fill(rig: Rig, request: Request, size: int = 8192) -> Stream:
    """Sends chunks until the stream has no room left, because its client does not read."""
    chunk = b"x" * size
    send(request, chunk)
    stream = request.stream
    assert stream is not None
    connection = connection_of(rig)
    while stream.has_room or not connection.writing_paused:
        if stream.has_room:
            send(request, chunk)
        await asyncio.sleep(0)
    return stream


async def test_a_client_that_does_not_read_holds_back_the_stream(rig: Rig, held: list[Request]) -> None:
    """But for what the kernel takes for it, only the stream's own buffer fills, which pauses the ranks."""
    async with rig.client(receive_buffer=4096) as client:
        client.send(POST)
        await until(lambda: held)
        stream = await fill(rig, held[0])
        for _ in range(100):
            await asyncio.sleep(0)
        assert not stream.has_room
        transport = rig.connections._connections[connection_of(rig)]
        assert 0 < transport.get_write_buffer_size() < STREAM_AHEAD + 10_000  # and one chunk
        end(held[0])
        rest = await client.rest_of_chunks()
        assert rest.endswith(b"\r\n2000\r\n" + b"x" * 8192 + b"\r\n0\r\n\r\n")
        assert stream.has_room


async def test_a_client_that_takes_no_byte_for_stream_stall_timeout_counts_as_gone(
    rig: Rig, held: list[Request], caplog: pytest.LogCaptureFixture
) -> None:
    async with rig.client(receive_buffer=4096) as client:
        client.send(POST)
        await until(lambda: held)
        stream = await fill(rig, held[0])
        await rig.pass_time(STALL_S - 1)
        assert not stream.muted
        await rig.pass_time(1)
        await until(lambda: stream.muted)
        await until(lambda: not rig.connections.connections)
        assert not (await client.rest()).endswith(b"0\r\n\r\n")
    assert rig.registry.find("m").dispatcher._live == set()
    assert caplog.records == []


async def test_the_models_own_stall_timeout_counts(rig: Rig, held: list[Request]) -> None:
    config = rig.registry.find("m").spec.config
    ours = config.minserve.model_copy(update={"stream_stall_timeout": 3.0})
    rig.add("hasty", config=config.model_copy(update={"minserve": ours})).attach(rig.lane)
    async with rig.client(receive_buffer=4096) as client:
        client.send(POST.replace(b"/m", b"/hasty"))
        await until(lambda: held)
        stream = await fill(rig, held[0])
        await rig.pass_time(2)
        assert not stream.muted
        await rig.pass_time(1)
        await until(lambda: stream.muted)


async def test_a_stalled_client_is_noticed_behind_the_end_of_its_stream_too(rig: Rig, held: list[Request]) -> None:
    async with rig.client(receive_buffer=4096) as client:
        client.send(POST)
        await until(lambda: held)
        stream = await fill(rig, held[0], size=2_000_000)
        end(held[0])
        await rig.pass_time(STALL_S)
        await until(lambda: stream.muted)
        await until(lambda: not rig.connections.connections)


async def test_a_client_that_reads_slowly_is_no_stalled_one(rig: Rig, held: list[Request]) -> None:
    async with rig.client(receive_buffer=4096) as client:
        client.send(POST)
        await until(lambda: held)
        stream = await fill(rig, held[0], size=20_000_000)
        transport = rig.connections._connections[connection_of(rig)]
        for _ in range(5):
            await rig.pass_time(STALL_S - 1)
            waiting = transport.get_write_buffer_size()
            while transport.get_write_buffer_size() == waiting:
                assert await client.reader.read(4096)
        assert not stream.muted
        assert connection_of(rig).writing_paused


async def test_a_client_that_takes_as_much_as_comes_is_no_stalled_one(rig: Rig, held: list[Request]) -> None:
    """What waits for it has the same size at each look, and yet is not the same."""
    async with rig.client() as client:
        client.send(POST)
        await until(lambda: held)
        send(held[0], b"one")
        assert await client.reader.readuntil(b"3\r\none\r\n")
        connection = connection_of(rig)
        await until(lambda: connection._current_request is not None)
        aborted: list[bool] = []
        always_full = SimpleNamespace(
            is_closing=lambda: False, get_write_buffer_size=lambda: 10_000, abort=lambda: aborted.append(True)
        )
        connection._paused = True
        for second in range(100):
            assert connection._current_request is not None
            connection._current_request.writer.output_size += 10_000
            connection.look(cast("asyncio.Transport", always_full), 1000.0 + second)
        assert not aborted
        for second in range(100, 132):
            connection.look(cast("asyncio.Transport", always_full), 1000.0 + second)
        assert aborted
        connection._paused = False


async def test_ranks_that_send_nothing_for_long_are_no_stalled_client(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(POST)
        await until(lambda: held)
        send(held[0], b"one")
        assert await client.reader.readuntil(b"3\r\none\r\n")
        for _ in range(3):
            await rig.pass_time(1000 * STALL_S)
        send(held[0], b"two")
        assert await client.reader.readuntil(b"3\r\ntwo\r\n")


async def test_the_answer_after_a_stream_has_the_servers_limit_again(rig: Rig, held: list[Request]) -> None:
    async with rig.client(receive_buffer=4096) as client:
        client.send(POST)
        await until(lambda: held)
        send(held[0], b"one")
        end(held[0])
        assert await client.reader.readuntil(b"0\r\n\r\n")
        client.send(POST)
        await until(lambda: len(held) == 2)
        end(held[1], b"x" * 20_000_000)
        await until(lambda: connection_of(rig).writing_paused)
        await rig.pass_time(STALL_S + 1)
        assert rig.connections.connections
        await rig.pass_time(OPTIONS.body_timeout - STALL_S)
        await until(lambda: not rig.connections.connections)
