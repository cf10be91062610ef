"""Predictions that are carried past aiohttp. Its own way is the reference for every byte."""

import asyncio
import logging
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from minserve.dispatch.request import Request
from minserve.errors import MinServeError, ModelUnhealthy, NoWorkers, WorkerFailed
from minserve.frontend import lane
from minserve.frontend.auth import KEY_FILE, Keys, Kind
from minserve.frontend.connection import Connection
from minserve.frontend.express import Express
from minserve.frontend.lane import MAX_BYTES
from minserve.frontend.passage import Passage
from minserve.wire.messages import Answer, Buffer
from tests.unit.frontend.rig import OPTIONS, FakeSupervisor, Raw, Rig, with_options
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio

HEAD = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\n"


def post(body: bytes = b"", *lines: bytes, path: bytes = b"/predictions/m") -> bytes:
    head = (b"POST %b HTTP/1.1" % path, b"Host: x", b"Content-Length: %d" % len(body), *lines)
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def carried(request: Request) -> bool:
    return isinstance(request.reply, Passage)


def replying(
    body: Buffer = b"ok", status: int = 200, reason: str = "", headers: tuple[tuple[str, str], ...] = ()
) -> Callable[[Request], object]:
    return lambda request: request.answer(Answer(0, len(body), status, reason, headers), body)


def failing(error: MinServeError) -> Callable[[Request], object]:
    return lambda request: request.fail(error)


def chunks(
    *parts: Buffer,
    status: int = 200,
    reason: str = "",
    headers: tuple[tuple[str, str], ...] = (),
    error: MinServeError | None = None,
) -> Callable[[Request], object]:
    def handle(request: Request) -> None:
        for part in parts:
            request.chunk(Answer(0, len(part), status, reason, headers), part, 2**20, lambda: None)
        if error is None:
            request.answer(Answer(0, 0), b"")
        else:
            request.fail(error)

    return handle


async def connection(rig: Rig) -> Connection:
    """The only one, once it waits for a request."""
    await until(lambda: [one for one in rig.connections.connections if one._waiter is not None])
    (one,) = rig.connections.connections
    assert isinstance(one, Connection)
    return one


# ── the same bytes ──

ODD = (("Set-Cookie", "a=1"), ("set-cookie", "b=2"), ("PRAGMA", "mine"), ("X-Request-Id", "forged"), ("X-Ü", "ö"))
FRAMING = (("Content-Length", "77"), ("Transfer-Encoding", "chunked"), ("connection", "close"), ("Date", "never"))
TYPED = (("Content-Type", "application/json"),)
REPLIES = {
    "plain": replying(),
    "empty": replying(b""),
    "bytearray": replying(bytearray(b"ok")),
    "memoryview": replying(memoryview(b"-ok-")[1:3]),
    "reason": replying(status=418, reason="I'm a teapot, ja"),
    "reason beyond ASCII": replying(status=201, reason="schön"),
    "201": replying(status=201),
    "404": replying(status=404, headers=TYPED),
    "599": replying(b"", status=599),
    "204": replying(status=204),
    "304": replying(status=304, headers=TYPED),
    "typed": replying(b'{"a": 1}', headers=TYPED),
    "untyped": replying(headers=(("content-type", ""),)),
    "odd": replying(headers=ODD),
    "framing": replying(headers=FRAMING),
    "server": replying(headers=(("Server", "forged"), ("Expires", "0"))),
    "largest": replying(b"x" * MAX_BYTES),
    "too large for it": replying(b"x" * (MAX_BYTES + 1)),
    "too large": replying(b"x" * 50_000),
    "failed": failing(WorkerFailed("rank 1 died")),
    "no workers": failing(NoWorkers("m", "")),
}


def masked(answer: bytes) -> bytes:
    """Without what differs from answer to answer."""
    answer = re.sub(rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-a[0-9a-f]{3}-[0-9a-f]{12}", b"ID", answer)
    return re.sub(rb"(?<=\r\nDate: )[A-Z][a-z]{2}, [^\r]*GMT", b"DATE", answer)


async def answers(rig: Rig, *requests: bytes) -> list[bytes]:
    """What comes for each of these requests, sent one after the other on one connection."""
    found = []
    async with rig.client() as client:
        for request in requests:
            client.send(request)
            status, head, body = await client.answer()
            if b"\r\nTransfer-Encoding: chunked\r\n" in head:
                body = await client.rest_of_chunks()
            elif status in (204, 304):
                body = b""
            found.append(masked(head + body))
    return found


@pytest.mark.parametrize("reply", REPLIES)
async def test_an_answer_is_aiohttps_to_the_byte(reply: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    requests = [post(b"abc"), post(b"", path=b"/predictions/m/1.0"), post(b"", b"x-request-id: mine")]
    options = OPTIONS.model_copy(update={"max_response_size": 40_000})
    found = []
    for express in (True, False):
        async with Rig(options, express=express) as rig:
            rig.lane.handle = REPLIES[reply]
            found.append(await answers(rig, *requests, *requests))
            assert [carried(request) for request in rig.lane.requests] == [express] * 6
            assert rig.in_flight.used == 0
            assert rig.registry.find("m").dispatcher._live == set()
    assert found[0] == found[1]
    assert b"\r\nx-request-id: ID\r\n" in found[0][0]
    assert b"\r\nx-request-id: mine\r\n" in found[0][2]


STREAMS = {
    "plain": chunks(b"one", bytearray(b"two\n"), memoryview(b"-3-")[1:2]),
    "nothing first": chunks(b"", b"one"),
    "nothing": chunks(b""),
    "reason": chunks(b"one", status=418, reason="I'm a teapot, ja"),
    "599": chunks(b"one", status=599),
    "204": chunks(b"one", status=204),
    "304": chunks(b"one", status=304),
    "typed": chunks(b"{}", headers=TYPED),
    "untyped": chunks(b"one", headers=(("content-type", ""),)),
    "image": chunks(b"one", headers=(("Content-Type", "image/png"),)),
    "events": chunks(b"data: 1\n\n", headers=(("content-type", "text/event-stream"), ("X-Accel-Buffering", "yes"))),
    "odd": chunks(b"one", headers=ODD),
    "framing": chunks(b"one", headers=FRAMING),
    "server": chunks(b"one", headers=(("Server", "forged"), ("Expires", "0"), ("TS_stream_NEXT", "no"))),
    "largest": chunks(b"x" * MAX_BYTES, b"y"),
    "too large for it": chunks(b"x" * (MAX_BYTES + 1), b"y"),
}


@pytest.mark.parametrize("accept", [b"*/*", b"text/event-stream"], ids=["bytes", "events"])
@pytest.mark.parametrize("stream", STREAMS)
async def test_a_stream_is_aiohttps_to_the_byte(stream: str, accept: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    found = []
    for express in (True, False):
        async with Rig(express=express) as rig:
            rig.lane.handle = STREAMS[stream]
            found.append(await answers(rig, *[post(b"abc", b"Accept: " + accept)] * 2))
            assert [carried(request) for request in rig.lane.requests] == [express] * 2
            assert rig.in_flight.used == 0
    assert found[0] == found[1]


@pytest.mark.parametrize("accept", [b"*/*", b"text/event-stream"], ids=["bytes", "events"])
@pytest.mark.parametrize("begins_with", [b"", b"one", b"x" * (MAX_BYTES + 1)], ids=["nothing", "little", "much"])
async def test_a_stream_that_breaks_off_is_aiohttps_to_the_byte(
    begins_with: bytes, accept: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    found = []
    for express in (True, False):
        async with Rig(express=express) as rig, rig.client() as client:
            rig.lane.handle = chunks(begins_with, error=WorkerFailed("gone"))
            client.send(post(b"abc", b"Accept: " + accept))
            found.append(masked(await client.rest()))
            assert carried(rig.lane.requests[0]) == express
    assert found[0] == found[1]


async def test_what_the_ranks_get_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    lines = (
        b"X-Twice: 1",
        b"x-twice: \xc3\xbc\xff",
        b"Content-Type:  text/plain; charset=x ",
        b"x-request-timeout-ms: 7000",
    )
    requests = [
        post(body, *lines, path=path) for path in (b"/predictions/m", b"/predictions/m/1.0") for body in (b"a", b"bc")
    ]
    found = []
    for express in (True, False):
        async with Rig(express=express) as rig:
            await answers(rig, *requests, *requests)
            assert [carried(request) for request in rig.lane.requests] == [express] * 8
            found.append(
                [
                    (request.meta.headers, request.meta.parts, request.meta.url_path, request.meta.operation)
                    + (b"".join(map(bytes, request.bodies)), request.named, round(request.deadline - request.arrived))
                    for request in rig.lane.requests
                ]
            )
    assert found[0] == found[1]
    assert found[0][0][-1] == 7


# ── what is nothing for it ──


@pytest.mark.parametrize(
    "request_",
    [
        post(path=b"/predictions/m/"),
        post(path=b"/predictions/m?a=1"),
        post(path=b"/predictions/%6d"),
        post(path=b"/predictions/m/1.0/rest"),
        post(path=b"/explanations/m"),
        post(path=b"/v1/models/m:predict"),
        post(path=b"http://x/predictions/m"),
        post(b"", b"Connection: close"),
        post(b"", b"Expect: 100-continue"),
        post(b"", b"Upgrade: h2c", b"Connection: upgrade"),
        post(b"a=b", b"Content-Type: application/x-www-form-urlencoded"),
        post(b"--b--", b"Content-Type: Multipart/Form-Data; boundary=b"),
        post().replace(b"1.1", b"1.0"),
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        HEAD + b"\r\n",
    ],
)
async def test_what_is_not_ordinary_goes_aiohttps_way(rig: Rig, request_: bytes) -> None:
    async with rig.client() as client:
        client.send(request_)
        assert (await client.answer())[0] == 200
    assert not carried(rig.lane.requests[-1])


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post(path=b"/predictions/none"), 404),
        (post(path=b"/predictions/m/2.0"), 404),
        (post().replace(b"POST", b"HEAD"), 405),
        (post(b"x" * 1001), 413),
        (post(b"", b"x-request-timeout-ms: soon"), 400),
    ],
)
async def test_errors_at_the_door_are_aiohttps(rig: Rig, request_: bytes, status: int) -> None:
    async with rig.client() as client:
        for data, expected in ((post(b"a"), 200), (request_, status), (post(b"a"), 200)):
            client.send(data)
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert b" %d " % expected in head
            if data.startswith(b"POST"):
                length = re.search(rb"Content-Length: (\d+)", head)
                assert length
                await client.reader.readexactly(int(length[1]))
    assert [carried(request) for request in rig.lane.requests] == [True, True]


@with_options(max_in_flight_bytes=5)
async def test_bodies_count_while_they_are_carried(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as first, rig.client() as second:
        first.send(post(b"abc"))
        await until(lambda: held)
        assert rig.in_flight.used == 3
        second.send(post(b"abc"))
        assert (await second.answer())[0] == 503
        held[0].answer(Answer(0, 2), b"ok")
        assert (await first.answer())[0] == 200
        assert rig.in_flight.used == 0


LARGE = bytes(range(256)) * 400  # over 64 KiB, from which on bodies go through shared memory


@with_options(max_request_size=2**20, max_in_flight_bytes=2**20)
@pytest.mark.parametrize("leaves", [False, True])
async def test_a_large_body_is_carried_in_shared_memory(rig: Rig, held: list[Request], leaves: bool) -> None:
    arena = rig.registry.find("m").dispatcher.arena
    assert arena is not None
    async with rig.client() as client:
        one = await connection(rig)
        one.data_received(post(LARGE))
        assert carried(held[0])
        assert held[0].segments is not None
        same = bytes(held[0].segments[0].view) == bytes(held[0].bodies[0]) == LARGE
        assert same
        assert arena.used
        assert rig.in_flight.used == len(LARGE)
        if leaves:
            client.reset()
        else:
            held[0].answer(Answer(0, 2), b"ok")
            assert (await client.answer())[::2] == (200, b"ok")
        await until(lambda: not arena.used)
        assert rig.in_flight.used == 0


@with_options(max_request_size=2**20, max_in_flight_bytes=2**20)
@pytest.mark.parametrize("size", [MAX_BYTES, MAX_BYTES + 1])
async def test_a_large_body_that_would_go_in_a_frame_goes_aiohttps_way(
    rig: Rig, held: list[Request], size: int
) -> None:
    rig.registry.find("m").dispatcher.arena = None
    async with rig.client() as client:
        one = await connection(rig)
        one.data_received(post(LARGE[:size]))
        await until(lambda: held)
        assert carried(held[0]) == (size == MAX_BYTES)
        held[0].answer(Answer(0, 2), b"ok")
        assert (await client.answer())[::2] == (200, b"ok")


async def test_a_refused_request_counts_once_and_is_answered(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rig.registry.find("m")
    model.dispatcher.refuse(ModelUnhealthy("gave up"))
    counted: list[bool] = []
    monkeypatch.setattr(model.dispatcher.meters, "arrived", counted.append)
    async with rig.client() as client:
        client.send(post())
        status, _, body = await client.answer()
        assert (status, b"gave up" in body) == (ModelUnhealthy("").status, True)
        model.dispatcher.admit()
        client.send(post())
        assert (await client.answer())[0] == 200
    assert counted == [False, False]


# ── one after the other ──


async def test_a_head_that_repeats_is_not_parsed_again_and_bodies_are_not_mixed_up(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[bytes] = []
    feed = Connection.feed

    def note(one: Connection, data: bytes) -> None:
        parsed.append(data)
        feed(one, data)

    monkeypatch.setattr(Connection, "feed", note)
    bodies = [b"abc", b"\r\n\r\n", b"x" * 20, b"", b"GET / HTTP/1.1\r\n\r\n", b"0" * 1000]
    async with rig.client() as client:
        for body in bodies:
            client.send(post(body, b"X: y"))
            assert (await client.answer())[::2] == (200, body)
    assert len(parsed) == 1
    assert [dict(request.meta.headers)[b"Content-Length"] for request in rig.lane.requests] == [
        b"%d" % len(body) for body in bodies
    ]


@pytest.mark.parametrize(
    "between",
    [b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n", post(b"abcd", path=b"/predictions/m/"), post(b"abcd", b"X: z")],
)
async def test_other_requests_may_come_between(rig: Rig, between: bytes) -> None:
    async with rig.client() as client:
        for data, body in ((post(b"abc"), b"abc"), (between, None), (post(b"de"), b"de"), (post(b"fg"), b"fg")):
            client.send(data)
            answer = await client.answer()
            assert answer[0] == 200
            assert body is None or answer[2] == body


async def test_a_piece_of_a_head_is_never_taken_for_a_whole_one(rig: Rig) -> None:
    """With a proxy in front another client's bytes may be behind it."""
    tail = b"Host: x\r\nContent-Length: 1\r\n\r\na"
    async with rig.client() as client:
        one = await connection(rig)
        client.send(b"POST /predictions/m HTTP/1.1\r\n")
        await until(lambda: one._head_size)
        client.send(tail)
        assert (await client.answer())[0] == 200
        client.send(tail)
        assert (await client.answer())[0] == 400
    assert len(rig.lane.requests) == 1


async def test_what_comes_while_a_request_is_carried_waits_for_its_answer(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(post(b"1"))
        await until(lambda: held)
        client.send(post(b"2") + post(b"3") + b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        (one,) = rig.connections.connections
        await until(lambda: len(one._messages) == 3)
        requests = []
        for number in range(3):
            await until(lambda: held)
            request = held.pop()
            requests.append(request)
            request.answer(Answer(0, 1), bytes(request.bodies[0]))
            assert (await client.answer())[2] == b"%d" % (number + 1)
        assert (await client.answer())[0] == 200
        rig.lane.handle = replying()
        client.send(post())
        assert (await client.answer())[2] == b"ok"
    assert [carried(request) for request in requests] == [True, False, False]


@pytest.mark.parametrize(
    "ends",
    [
        (b"\r\n\r\n", b"\n\n"),
        (b"\r\n\r\n", b"\r\n\n"),
        (b"\r\n\r\n", b"\n\r\n"),
        (b"\r\nHost", b"\nHost"),
    ],
)
async def test_a_line_ends_in_two_bytes(rig: Rig, ends: tuple[bytes, bytes]) -> None:
    """Else the first empty line, by which a known head is told from its body, would not be the end of a head."""
    async with rig.client() as client:
        client.send(post(b"\r\n\r\n").replace(*ends, 1))
        assert (await client.answer())[0] == 400
    assert rig.lane.requests == []


@pytest.mark.parametrize("lines", [b"\r\n", b"\r\n\r\n", b"\n\r\n\r\n"])
async def test_empty_lines_before_a_head_are_no_end_of_it(rig: Rig, lines: bytes) -> None:
    """The three digits of the length once made the empty lines alone a head that was known."""
    body = bytes(100)
    async with rig.client() as client:
        one = await connection(rig)
        for _ in range(2):
            client.send(lines + post(body)[: -len(body)])
            await until(lambda: one._early or one._due > 0)
            assert one._due in (0, len(body))
            assert one._known is not None
            assert len(one._known.text) == len(lines) + len(post(body)) - len(body)
            client.send(body)
            assert (await client.answer())[::2] == (200, body)
            await connection(rig)


async def test_a_head_behind_a_body_is_not_passed_over(rig: Rig) -> None:
    """The parser stands in its middle."""
    async with rig.client() as client:
        one = await connection(rig)
        client.send(HEAD + b"Content-Length: 3\r\n\r\n")
        await until(lambda: one._due == 3)
        client.send(b"abc" + b"POST /x")
        assert (await client.answer())[0] == 200
        client.send(post(b"abc"))
        assert (await client.answer())[0] == 400
    assert len(rig.lane.requests) == 1


@pytest.mark.parametrize("outcome", [failing(WorkerFailed("gone")), chunks(b"a")], ids=["error", "stream"])
async def test_what_is_handed_over_comes_before_what_waits(
    rig: Rig, held: list[Request], outcome: Callable[[Request], object]
) -> None:
    async with rig.client() as client:
        client.send(post(b"1"))
        await until(lambda: held)
        (one,) = rig.connections.connections
        client.send(post(b"2", b"x-request-id: second"))
        await until(lambda: one._messages)
        outcome(held.pop())
        _, head, _ = await client.answer()
        assert b"second" not in head
        if b"chunked" in head:
            await client.rest_of_chunks()
        await until(lambda: held)
        replying()(held.pop())
        assert b"second" in (await client.answer())[1]


@pytest.mark.parametrize(
    "outcome", [replying(), failing(WorkerFailed("gone")), chunks(b"a")], ids=["ok", "error", "stream"]
)
async def test_a_whole_burst_keeps_its_order(rig: Rig, outcome: Callable[[Request], object]) -> None:
    async def settle(request: Request) -> None:
        await asyncio.sleep(0)
        outcome(request)

    tasks: set[asyncio.Task[None]] = set()
    rig.lane.handle = lambda request: tasks.add(asyncio.ensure_future(settle(request)))
    async with rig.client() as client:
        for _ in range(20):
            client.send(post(b"a"))
            await asyncio.sleep(0)
        client.send(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        rest = await client.rest()
    assert rest.count(b"HTTP/1.1 ") == 21
    assert rest.rindex(b"Healthy") > rest.rindex(b"x-request-id", 0, rest.rindex(b"HTTP/1.1"))
    assert len(rig.lane.requests) == 20


# ── head and body apart, as many clients send them ──


async def apart(rig: Rig, client: Raw, body: bytes) -> None:
    """Sends a request whose head arrives before its body."""
    one = await connection(rig)
    data = post(body)
    client.send(data[: len(data) - len(body)])
    await until(lambda: one._early or one._waiter is None)
    client.send(body)


async def test_a_head_that_is_known_waits_a_little_for_its_body(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "HOLD_S", 10.0)
    async with rig.client() as client:
        for body in (b"abc", b"de", b"fgh"):
            await apart(rig, client, body)
            assert (await client.answer())[::2] == (200, body)
    assert [carried(request) for request in rig.lane.requests] == [False, True, True]


@pytest.mark.parametrize("late", ["body", "eof"])
async def test_a_body_that_lets_itself_be_waited_for_is_aiohttps_affair(rig: Rig, late: str) -> None:
    async with rig.client() as client:
        client.send(post(b"abc"))
        assert (await client.answer())[0] == 200
        one = await connection(rig)
        client.send(HEAD + b"Content-Length: 3\r\n\r\n")
        await until(lambda: one._early)
        if late == "eof":
            client.writer.write_eof()
            assert (await client.answer())[0] == 400
            return
        await until(lambda: one._current_request is not None)
        assert not one._early
        client.send(b"d")
        await asyncio.sleep(0)
        client.send(b"ef")
        assert (await client.answer())[::2] == (200, b"def")
        assert not carried(rig.lane.requests[-1])


async def test_a_client_that_leaves_behind_its_head_is_forgotten(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "HOLD_S", 10.0)
    async with rig.client() as client:
        client.send(post(b"abc"))
        assert (await client.answer())[0] == 200
        one = await connection(rig)
        client.send(HEAD + b"Content-Length: 3\r\n\r\n")
        await until(lambda: one._early)
        client.reset()
        await until(lambda: not rig.connections.connections)
        assert (one._early, one._timer) == (b"", None)
    assert len(rig.lane.requests) == 1


# ── streams ──


async def test_the_first_chunk_leaves_before_aiohttp_wakes_up(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(post())
        await until(lambda: held)
        held[0].chunk(Answer(0, 3), b"one", 100, lambda: None)
        with socket.socket(fileno=os.dup(client.writer.get_extra_info("socket").fileno())) as sock:
            come = sock.recv(2**16, socket.MSG_PEEK)
        assert come.startswith(b"HTTP/1.1 200 ")
        assert come.endswith(b"\r\n\r\n3\r\none\r\n")
        assert held[0].stream is not None
        assert held[0].stream.has_room


async def test_a_client_that_ends_its_direction_behind_the_first_chunk_has_left(rig: Rig, held: list[Request]) -> None:
    """There is no byte that could be sent to see whether it is still there: an answer has begun."""
    async with rig.client() as client:
        client.send(post())
        await until(lambda: held)
        (one,) = rig.connections.connections
        held[0].chunk(Answer(0, 3), b"one", 100, lambda: None)
        one.eof_received()
        assert b"100 Continue" not in await client.rest()
    assert held[0].stream is not None
    assert held[0].stream.muted
    await until(lambda: not rig.connections.connections)
    assert (rig.registry.find("m").dispatcher._live, rig.in_flight.used) == (set(), 0)


# ── clients that leave, and do not read ──


async def test_a_client_that_leaves_takes_its_request_out_of_the_queue(rig: Rig) -> None:
    dispatcher = rig.add("slow")
    async with rig.client() as client:
        client.send(post(b"abc", path=b"/predictions/slow"))
        await until(lambda: dispatcher.queued == 1)
        (request,) = dispatcher._queue
        assert carried(request)
        client.reset()
        await until(lambda: not rig.connections.connections)
    assert (dispatcher.queued, dispatcher._live, rig.in_flight.used) == (0, set(), 0)
    assert request.left


async def test_a_client_that_leaves_in_flight_gets_no_answer_and_disturbs_nobody(
    rig: Rig, held: list[Request], caplog: pytest.LogCaptureFixture
) -> None:
    async with rig.client() as client:
        client.send(post(b"abc"))
        await until(lambda: held)
        client.reset()
        await until(lambda: not rig.connections.connections)
    assert held[0].left
    assert not held[0].answer(Answer(0, 2), b"ok")
    assert (rig.registry.find("m").dispatcher._live, rig.in_flight.used) == (set(), 0)
    assert caplog.records == []


async def test_a_client_that_has_gone_is_missed_behind_a_request_that_aiohttp_has_read(
    rig: Rig, held: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "HOLD_S", 10.0)
    async with rig.client() as client:
        await apart(rig, client, b"abc")
        await until(lambda: held)
        held[0].answer(Answer(0, 2), b"ok")
        assert (await client.answer())[0] == 200
        await apart(rig, client, b"def")
        await until(lambda: len(held) == 2)
        assert [carried(request) for request in held] == [False, True]
        client.writer.close()  # no reset: it was sent nothing that it has not read
        await until(lambda: not rig.connections.connections)
    assert held[1].left
    assert (rig.registry.find("m").dispatcher._live, rig.in_flight.used) == (set(), 0)


async def test_a_stream_that_nobody_has_taken_over_is_muted(rig: Rig, held: list[Request]) -> None:
    """Else its ranks would wait for room for ever."""
    async with rig.client() as client:
        client.send(post(b"abc"))
        await until(lambda: held)
        (one,) = rig.connections.connections
        held[0].chunk(Answer(0, 1), b"1", 100, lambda: None)
        one.connection_lost(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert held[0].stream is not None
    assert held[0].stream.muted
    assert rig.in_flight.used == 0


async def test_a_client_that_has_ended_its_direction_gets_its_answer(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(post(b"abc"))
        await until(lambda: held)
        client.writer.write_eof()
        assert (await client.answer())[0] == 100
        held[0].answer(Answer(0, 2), b"ok")
        assert (await client.answer())[::2] == (200, b"ok")
        assert await client.rest() == b""


@with_options(max_response_size=2**20)
async def test_to_a_client_that_does_not_read_aiohttp_writes(rig: Rig) -> None:
    rig.lane.handle = replying(b"x" * MAX_BYTES)
    async with rig.client(receive_buffer=4096) as client:
        one = await connection(rig)
        transport = rig.connections._connections[one]
        count = 0
        while not transport.get_write_buffer_size():
            count += 1
            client.send(post())
            await until(lambda: len(rig.lane.requests) == count and one._waiter is not None)  # noqa: B023
        client.send(post())
        await until(lambda: len(rig.lane.requests) == count + 1)
        assert [carried(request) for request in rig.lane.requests[-2:]] == [True, False]
        for _ in rig.lane.requests:
            assert len((await client.answer())[2]) == MAX_BYTES


async def test_to_a_client_that_has_stopped_reading_aiohttp_writes(rig: Rig, held: list[Request]) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    async with rig.client(receive_buffer=4096) as client:
        client.send(post())
        await until(lambda: held)
        (one,) = rig.connections.connections
        assert isinstance(one, Connection)
        assert one.transport is not None
        while one.takes_answer:
            one.transport.write(interim * 1000)
            await asyncio.sleep(0)
        held[0].answer(Answer(0, 2), b"ok")
        assert one._carried is held[0].reply
        answer = await client.answer()
        while answer[0] == 100:
            answer = await client.answer()
        assert answer[::2] == (200, b"ok")


# ── the end of a server ──


async def test_the_end_of_a_server_waits_for_what_is_carried(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(post(b"abc"))
        await until(lambda: held)
        ending = asyncio.create_task(rig.inference.close())
        (one,) = rig.connections.connections
        await until(lambda: one._handler_waiter is not None)
        held[0].answer(Answer(0, 2), b"ok")
        assert (await client.answer())[::2] == (200, b"ok")
        assert await client.rest() == b""
        await ending


async def test_a_connection_that_is_to_close_closes_behind_the_answer(rig: Rig, held: list[Request]) -> None:
    async with rig.client() as client:
        client.send(post(b"abc"))
        await until(lambda: held)
        (one,) = rig.connections.connections
        one.close()
        held[0].answer(Answer(0, 2), b"ok")
        assert (await client.answer())[::2] == (200, b"ok")
        assert await client.rest() == b""
    await until(lambda: not rig.connections.connections)


# ── what is told ──


@with_options(access_log=True)
async def test_each_answer_has_its_line_in_the_access_log(
    rig: Rig, held: list[Request], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "minserve.access")
    async with rig.client() as client:
        for outcome in (replying(status=201), failing(WorkerFailed("gone")), chunks(b"a", status=202)):
            client.send(post())
            await until(lambda: held)
            request = held.pop()
            assert isinstance(request.reply, Passage)
            request.reply.since -= 1000.0
            outcome(request)
            await client.answer()
        await until(lambda: len(caplog.records) == 3)
    lines = [record.getMessage() for record in caplog.records if record.name == "minserve.access"]
    assert [re.sub(r":\d+ |\d{3}$", " ", line) for line in lines] == [
        '/127.0.0.1 "POST /predictions/m HTTP/1.1" 201 1000 ',
        f'/127.0.0.1 "POST /predictions/m HTTP/1.1" {WorkerFailed("").status} 1000 ',
        '/127.0.0.1 "POST /predictions/m HTTP/1.1" 202 1000 ',
    ]


async def test_answers_are_counted_and_measured(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(rig.registry.metrics, "answered", counted.append)
    async with rig.client() as client:
        for handle in (replying(status=404), failing(WorkerFailed("gone")), replying(), chunks(b"a", b"b", status=202)):
            rig.lane.handle = handle
            client.send(post())
            await client.answer()
        await client.rest_of_chunks()
    assert counted == [404, WorkerFailed("").status, 200, 202]
    assert sum(rig.registry.find("m").dispatcher.meters.frontend._counts) == 3


async def test_a_mistake_of_ours_costs_one_connection_and_no_other_request(
    rig: Rig, held: list[Request], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig.client() as client, rig.client() as other:
        client.send(post())
        await until(lambda: held)
        other.send(post())
        await until(lambda: len(held) == 2)
        with monkeypatch.context() as patch:
            patch.setattr(Express, "_ordinary", None)
            held[0].answer(Answer(0, 2), b"ok")
        held[1].answer(Answer(0, 2), b"ok")
        assert (await other.answer())[0] == 200
        assert await client.rest() == b""
    assert "unforeseen" in caplog.text


# ── keys, and pages of other origins ──


async def test_a_key_is_asked_for_each_time_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    now = [1000.0]
    keys = Keys(tmp_path / KEY_FILE, 1.0, lambda: now[0])
    async with Rig(keys=keys) as rig, rig.client() as client:
        good = b"Authorization: Bearer " + keys._keys[Kind.INFERENCE].text.encode()
        for line, status in ((good, 200), (good, 200), (good + b"x", 400), (good, 200)):
            client.send(post(b"a", line))
            assert (await client.answer())[0] == status
        assert all(carried(request) for request in rig.lane.requests)
        assert len(rig.lane.requests) == 3
        held: list[Request] = []
        rig.lane.handle = held.append
        client.send(post(b"a", good))
        await until(lambda: held)
        now[0] += 100.0  # the answer of a request that had its key is not kept from it
        chunks(b"a")(held[0])
        assert (await client.answer())[0] == 200
        await client.rest_of_chunks()
        client.send(post(b"a", good))
        assert (await client.answer())[0] == 400


@with_options(cors_allowed_origin="http://a.example")
async def test_with_cors_nothing_is_carried(rig: Rig) -> None:
    async with rig.client() as client:
        client.send(post())
        assert b"Access-Control-Allow-Origin: http://a.example" in (await client.answer())[1]
    assert not carried(rig.lane.requests[-1])
