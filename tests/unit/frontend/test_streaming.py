import asyncio

import aiohttp
import pytest

from minserve.dispatch.request import Request
from minserve.errors import WorkerFailed
from minserve.wire.messages import Answer
from tests.unit.frontend.rig import Rig
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio

HEADERS = (("Content-Type", "text/event-stream"), ("X-Model", "m"))


@pytest.fixture
def held(rig: Rig) -> list[Request]:
    """Requests whose answers the test sends."""
    requests: list[Request] = []
    rig.lane.handle = requests.append
    return requests


async def test_each_chunk_leaves_at_once_and_then_comes_the_end(rig: Rig, held: list[Request]) -> None:
    post = asyncio.create_task(rig.inference.post("/predictions/m", data=b""))
    await until(lambda: held)
    held[0].chunk(Answer(0, 3, 201, "Streaming", HEADERS), b"one")
    async with asyncio.timeout(10), await post as response:
        assert (response.status, response.reason) == (201, "Streaming")
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["X-Model"] == "m"
        assert response.headers["Transfer-Encoding"] == "chunked"
        assert response.headers["x-request-id"] == held[0].meta.id
        assert await response.content.readany() == b"one"
        for chunk in (b"two", b"three"):
            held[0].chunk(Answer(0, len(chunk)), chunk)
            assert await response.content.readany() == chunk
        held[0].answer(Answer(0, 4), b"last")
        assert await response.content.read() == b"last"


async def test_a_chunk_of_nothing_does_not_end_the_stream(rig: Rig, held: list[Request]) -> None:
    post = asyncio.create_task(rig.inference.post("/predictions/m", data=b""))
    await until(lambda: held)
    for chunk in (b"", b"one", b"", memoryview(b"two")):
        held[0].chunk(Answer(0, len(chunk)), chunk)
    held[0].answer(Answer(0, 0), b"")
    async with asyncio.timeout(10), await post as response:
        assert await response.read() == b"onetwo"
        assert "Content-Type" not in response.headers


async def test_a_stream_that_breaks_off_does_not_look_whole(
    rig: Rig, held: list[Request], caplog: pytest.LogCaptureFixture
) -> None:
    post = asyncio.create_task(rig.inference.post("/predictions/m", data=b""))
    await until(lambda: held)
    held[0].chunk(Answer(0, 3), b"one")
    async with asyncio.timeout(10), await post as response:
        assert await response.content.readany() == b"one"
        held[0].fail(WorkerFailed("m/0: rank 1 died"))
        with pytest.raises(aiohttp.ClientError):
            await response.content.read()
    assert "/predictions/m: stream broken off: m/0: rank 1 died" in caplog.text


async def test_an_http_1_0_client_gets_the_bytes_and_a_closed_connection(rig: Rig, held: list[Request]) -> None:
    post = asyncio.create_task(rig.raw(b"POST /predictions/m HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"))
    await until(lambda: held)
    for chunk in (b"one", b"two"):
        held[0].chunk(Answer(0, 3), chunk)
    held[0].answer(Answer(0, 0), b"")
    status, head, rest = await post
    assert (status, rest) == (200, b"onetwo")
    assert b"chunked" not in head.lower()


@pytest.mark.parametrize("name", ["Content-Length", "Transfer-Encoding"])
async def test_a_handlers_header_cannot_break_the_framing_of_its_stream(
    rig: Rig, held: list[Request], name: str
) -> None:
    one = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    post = asyncio.create_task(rig.raw(one))
    await until(lambda: held)
    held[0].chunk(Answer(0, 3, 200, "", ((name, "1"),)), b"one")
    held[0].answer(Answer(0, 0), b"")
    status, head, rest = await post
    assert (status, rest) == (200, b"3\r\none\r\n0\r\n\r\n")
    assert b"content-length" not in head.lower()
    assert head.lower().count(b"transfer-encoding: chunked") == 1


async def test_a_stream_whose_status_allows_no_body_sends_none(rig: Rig, held: list[Request]) -> None:
    """Its bytes would be taken for the beginning of the next answer on the connection."""
    one = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    post = asyncio.create_task(rig.raw(one))
    await until(lambda: held)
    held[0].chunk(Answer(0, 3, 204), b"one")
    held[0].answer(Answer(0, 0), b"")
    status, _, rest = await post
    assert (status, rest) == (204, b"")


async def test_a_client_that_leaves_mutes_its_stream_and_nothing_is_logged(
    rig: Rig, held: list[Request], caplog: pytest.LogCaptureFixture
) -> None:
    post = asyncio.create_task(rig.inference.post("/predictions/m", data=b""))
    await until(lambda: held)
    held[0].chunk(Answer(0, 3), b"one")
    response = await post
    stream = held[0].stream
    assert stream is not None
    response.close()
    for _ in range(50):
        held[0].chunk(Answer(0, 4), b"more")
        await asyncio.sleep(0)
    await until(lambda: stream.muted)
    held[0].answer(Answer(0, 0), b"")
    assert caplog.records == []
    assert rig.registry.find("m").dispatcher._live == set()
