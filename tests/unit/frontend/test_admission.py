import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import ClientResponse

from minserve.dispatch.request import Request
from minserve.errors import BadRequest, HandlerError, Unavailable
from minserve.frontend.admission import InFlightBytes, request_timeout
from minserve.wire.messages import Answer
from tests.unit.frontend.rig import OPTIONS, Raw, Rig, with_options
from tests.unit.worker.specs import until

HEAD = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\n"
LIMIT = OPTIONS.max_in_flight_bytes
MOST = OPTIONS.max_request_size

# ── the client's deadline ──


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 10.0),
        ({"x-request-timeout-ms": "1500"}, 1.5),
        ({"x-request-timeout-ms": "0.5"}, 0.0005),
        ({"x-request-timeout-seconds": "2.5"}, 2.5),
        ({"x-request-timeout-ms": "3000", "x-request-timeout-seconds": "2"}, 2.0),
        ({"x-request-timeout-ms": "10001"}, 10.0),
        ({"x-request-timeout-ms": "9" * 400}, 10.0),
    ],
)
def test_a_client_may_ask_for_less_time_than_the_model_allows_and_not_for_more(
    headers: dict[str, str], seconds: float
) -> None:
    assert request_timeout(headers, 10.0) == pytest.approx(seconds)


@pytest.mark.parametrize("name", ["x-request-timeout-ms", "x-request-timeout-seconds"])
@pytest.mark.parametrize(
    "given", ["", "soon", "0", "0.0", "-1", "+1", "1e3", "inf", "nan", "1_000", " 1", "1,000", "0x10", "١٢", "1.", ".5"]
)
def test_a_deadline_that_is_no_number_is_refused_with_header_found_and_allowed(name: str, given: str) -> None:
    unit = "milliseconds" if name.endswith("ms") else "seconds"
    with pytest.raises(BadRequest) as caught:
        request_timeout({name: given}, 10.0)
    assert str(caught.value) == f"{name}: found {given!r}, allowed: a number of {unit} > 0"


def test_a_refusal_quotes_no_more_than_the_beginning() -> None:
    with pytest.raises(BadRequest) as caught:
        request_timeout({"x-request-timeout-ms": "x" * 8000}, 10.0)
    assert len(str(caught.value)) < 200


@pytest.mark.asyncio
async def test_nonsense_is_a_400(rig: Rig) -> None:
    async with rig.inference.post("/predictions/m", data=b"", headers={"X-Request-Timeout-Ms": "soon"}) as response:
        assert response.status == 400
        answer = json.loads(await response.text())
    assert answer["message"] == "x-request-timeout-ms: found 'soon', allowed: a number of milliseconds > 0"
    assert rig.lane.requests == []


@pytest.mark.asyncio
@pytest.mark.parametrize("in_flight", [True, False], ids=["in flight", "queued"])
async def test_a_request_has_the_time_that_its_client_gives_it(rig: Rig, held: list[Request], in_flight: bool) -> None:
    dispatcher = rig.registry.find("m").dispatcher
    if not in_flight:
        dispatcher.detach(rig.lane)
    async with rig.inference.post("/predictions/m", data=b"", headers={"x-request-timeout-ms": "20"}) as response:
        assert response.status == 504
        assert json.loads(await response.text())["type"] == "RequestTimeoutException"
    assert len(held) <= in_flight
    assert dispatcher.queued == 0


@pytest.mark.asyncio
async def test_the_models_own_time_is_the_most(rig: Rig) -> None:
    config = rig.registry.find("m").spec.config.model_copy(update={"client_timeout_in_mills": 20})
    rig.add("hasty", config=config)
    async with rig.inference.post(
        "/predictions/hasty", data=b"", headers={"x-request-timeout-ms": "100000"}
    ) as response:
        assert response.status == 504


# ── the bytes in flight ──


def test_what_is_taken_is_given_back_once() -> None:
    everything = InFlightBytes(10)
    one, two = everything.share(), everything.share()
    one.grow(4)
    one.grow(2)
    two.grow(4)
    with pytest.raises(Unavailable, match=r"have 10 bytes, 1 more would exceed max_in_flight_bytes \(10\)"):
        two.grow(1)
    assert everything.used == 10
    one.give_back()
    one.give_back()
    assert everything.used == 4
    two.give_back()
    assert everything.used == 0


def used(rig: Rig) -> int:
    return rig.in_flight.used


@pytest.mark.asyncio
@with_options(max_in_flight_bytes=10)
@pytest.mark.parametrize("kind", ["small", "in chunks"])
async def test_a_body_that_finds_no_room_is_a_503_and_finds_it_later(rig: Rig, held: list[Request], kind: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"xx"
        yield b"xx"

    def post() -> Awaitable[ClientResponse]:
        return rig.inference.post("/predictions/m", data=b"xxxx" if kind == "small" else pieces())

    first = asyncio.create_task(rig.inference.post("/predictions/m", data=b"1234567"))
    await until(lambda: held)
    async with await post() as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        answer = json.loads(await response.text())
        assert answer["type"] == "ServiceUnavailableException"
        assert "would exceed max_in_flight_bytes (10)" in answer["message"]
    assert used(rig) == 7
    held.pop().answer(Answer(0, 0), b"")
    (await first).close()
    rig.lane.handle = lambda request: request.answer(Answer(0, 0), b"")
    async with await post() as response:
        assert response.status == 200
    assert used(rig) == 0


@pytest.mark.asyncio
async def test_room_for_a_declared_length_is_made_before_the_body_comes(rig: Rig) -> None:
    """So no client is cut off halfway by those that came after it."""
    async with rig.client() as client:
        client.send(HEAD + b"Content-Length: %d\r\n\r\nx" % MOST)
        await until(lambda: used(rig) == MOST)
    await until(lambda: used(rig) == 0)


async def answered(rig: Rig, client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"Content-Length: 3\r\n\r\nabc")
    await until(lambda: held)
    assert used(rig) == 3
    held[0].answer(Answer(0, 0), b"")


async def failed(rig: Rig, client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"Content-Length: 3\r\n\r\nabc")
    await until(lambda: held)
    held[0].fail(HandlerError("no"))


async def expired(rig: Rig, client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"x-request-timeout-ms: 20\r\nContent-Length: 3\r\n\r\nabc")
    assert (await client.answer())[0] == 504


async def left(rig: Rig, client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"Content-Length: 3\r\n\r\nabc")
    await until(lambda: held)
    client.writer.transport.abort()


async def left_amid_its_body(rig: Rig, client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"Content-Length: 3\r\n\r\na")
    await until(lambda: used(rig) == 3)
    client.writer.transport.abort()


async def cut_short(rig: Rig, client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    await until(lambda: used(rig) == 3)
    client.writer.write_eof()


async def bad_chunk(rig: Rig, client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    await until(lambda: used(rig) == 3)
    client.send(b"zz\r\n")


async def too_large(rig: Rig, client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    await until(lambda: used(rig) == 3)
    client.send(b"%x\r\n" % MOST + b"x" * MOST + b"\r\n0\r\n\r\n")


async def bad_form(rig: Rig, client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 3\r\n\r\nabc")
    assert (await client.answer())[0] == 400


async def stalled(rig: Rig, client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"Content-Length: 3\r\n\r\na")
    await until(lambda: used(rig) == 3)
    assert (await client.answer())[0] == 408


async def streamed(rig: Rig, client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"Content-Length: 3\r\n\r\nabc")
    await until(lambda: held)
    held[0].chunk(Answer(0, 3), b"one", 100, lambda: None)
    await client.reader.readuntil(b"one")
    assert used(rig) == 3
    held[0].answer(Answer(0, 0), b"")


async def stream_broken(rig: Rig, client: Raw, held: list[Request]) -> None:
    client.send(HEAD + b"Content-Length: 3\r\n\r\nabc")
    await until(lambda: held)
    held[0].chunk(Answer(0, 3), b"one", 100, lambda: None)
    held[0].fail(HandlerError("no"))


@pytest.mark.asyncio
@with_options(body_timeout=0.5)
@pytest.mark.parametrize(
    "ends",
    [
        *(answered, failed, expired, left, left_amid_its_body, cut_short),
        *(bad_chunk, too_large, bad_form, stalled, streamed, stream_broken),
    ],
)
async def test_room_is_given_back_however_a_request_ends(
    rig: Rig, held: list[Request], ends: Callable[[Rig, Raw, list[Request]], Awaitable[None]]
) -> None:
    async with rig.client() as client:
        await ends(rig, client, held)
        await until(lambda: rig.connections.requests_count)
        await until(lambda: used(rig) == 0)
        async with rig.client() as other:  # as much as there is room for
            rig.lane.handle = lambda request: request.answer(Answer(0, 2), b"ok")
            other.send(HEAD + b"Content-Length: 2\r\n\r\nok")
            assert (await other.answer())[::2] == (200, b"ok")
    assert used(rig) == 0
