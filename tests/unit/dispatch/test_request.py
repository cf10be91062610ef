from __future__ import annotations

import asyncio
import math

import pytest

from minserve.dispatch.request import CHUNK_OVERHEAD, Request, Stream
from minserve.errors import DeadlineExceeded, WorkerFailed
from minserve.wire.messages import Answer, RequestMeta

ANSWER = Answer(0, 0, 418, "Teapot", (("x-a", "1"),))


def new_request() -> Request:
    return Request(RequestMeta("id", (), ()), [], 100.0, asyncio.get_running_loop().create_future())


async def drain(stream: Stream) -> list[bytes]:
    chunks: list[bytes] = []
    while some := await stream.take(1):
        chunks += map(bytes, some)
    return chunks


@pytest.mark.asyncio
async def test_a_whole_answer_is_the_reply() -> None:
    request = new_request()
    request.answer(ANSWER, b"body")
    reply = request.reply.result()
    assert (reply.status, reply.reason, reply.headers, reply.body) == (418, "Teapot", (("x-a", "1"),), b"body")
    assert reply.stream is None


@pytest.mark.asyncio
async def test_only_the_first_outcome_counts() -> None:
    request = new_request()
    request.fail(DeadlineExceeded("late"))
    request.answer(ANSWER, b"body")
    request.fail(WorkerFailed("dead"))
    with pytest.raises(DeadlineExceeded, match="late"):
        await request.reply


@pytest.mark.asyncio
async def test_the_first_chunk_is_the_reply_and_meets_the_deadline() -> None:
    request = new_request()
    request.chunk(ANSWER, b"1", 100, lambda: None)
    reply = request.reply.result()
    assert (reply.status, reply.reason, reply.headers, reply.body) == (418, "Teapot", (("x-a", "1"),), b"")
    assert request.deadline == math.inf
    assert reply.stream is request.stream


@pytest.mark.asyncio
@pytest.mark.parametrize(("last", "expected"), [(b"3", [b"1", b"2", b"3"]), (b"", [b"1", b"2"])])
async def test_chunks_come_in_order_and_the_answer_is_the_last(last: bytes, expected: list[bytes]) -> None:
    request = new_request()
    request.chunk(ANSWER, b"1", 100, lambda: None)
    request.chunk(ANSWER, b"2", 100, lambda: None)
    request.answer(ANSWER, last)
    assert request.stream is not None
    assert await drain(request.stream) == expected


@pytest.mark.asyncio
async def test_a_failure_in_mid_stream_comes_after_the_chunks() -> None:
    request = new_request()
    request.chunk(ANSWER, b"1", 100, lambda: None)
    request.fail(WorkerFailed("rank 1 died"))
    request.answer(ANSWER, b"too late")
    assert request.stream is not None
    assert await request.stream.take(1) == [b"1"]
    for _ in range(2):  # asked again it is no clean end either
        with pytest.raises(WorkerFailed, match="rank 1 died"):
            await request.stream.take(1)


@pytest.mark.asyncio
async def test_a_stream_that_begins_after_its_client_was_answered_keeps_nothing() -> None:
    request = new_request()
    request.fail(DeadlineExceeded("late"))
    request.chunk(ANSWER, b"1", 100, lambda: None)
    request.chunk(ANSWER, b"2", 100, lambda: None)
    request.answer(ANSWER, b"3")
    assert request.stream is not None
    assert await drain(request.stream) == []
    with pytest.raises(DeadlineExceeded):
        await request.reply


@pytest.mark.asyncio
async def test_muting_drops_what_has_come_and_what_will() -> None:
    stream = Stream(100, lambda: None)
    stream.put(b"1")
    stream.mute()
    stream.put(b"2")
    stream.end()
    assert await drain(stream) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("event", ["put", "end", "error"])
async def test_take_waits_for_what_comes(event: str) -> None:
    stream = Stream(100, lambda: None)
    waiting = asyncio.create_task(stream.take(1))
    await asyncio.sleep(0)
    assert not waiting.done()
    match event:
        case "put":
            stream.put(b"1")
            assert await waiting == [b"1"]
        case "end":
            stream.end()
            assert await waiting == []
        case "error":
            stream.end(WorkerFailed("dead"))
            with pytest.raises(WorkerFailed):
                await waiting


@pytest.mark.asyncio
async def test_a_cancelled_take_loses_no_chunk() -> None:
    stream = Stream(100, lambda: None)
    waiting = asyncio.create_task(stream.take(1))
    await asyncio.sleep(0)
    waiting.cancel()
    stream.put(b"1")
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await stream.take(1) == [b"1"]


@pytest.mark.asyncio
async def test_what_has_come_is_taken_together_but_not_more_bytes_than_are_wanted() -> None:
    changes: list[bool] = []
    stream = Stream(5 + 2 * CHUNK_OVERHEAD, lambda: changes.append(stream.has_room))
    for chunk in (b"1", b"22", b"333", b"4444444", b"5"):
        stream.put(chunk)
    assert await stream.take(6) == [b"1", b"22"]
    assert changes == []
    assert await stream.take(6) == [b"333"]
    assert await stream.take(6) == [b"4444444"], "the first one comes in any case"
    assert changes == [True]
    stream.end()
    assert await stream.take(6) == [b"5"]
    assert await stream.take(6) == []
    assert changes == [True]


@pytest.mark.asyncio
async def test_small_chunks_count_for_what_they_take() -> None:
    stream = Stream(1000, lambda: None)
    count = 0
    while stream.has_room:
        stream.put(b"1")
        count += 1
    assert count <= 1000 / CHUNK_OVERHEAD
    assert len(await stream.take(1000)) == count
    assert stream.waiting == 0


@pytest.mark.asyncio
async def test_chunks_of_nothing_do_not_pile_up_for_a_slow_client() -> None:
    """They have no bytes, so nothing would hold back the ranks."""
    stream = Stream(100, lambda: None)
    for chunk in (b"", b"", b"1", b"", b"", b"2", b""):
        stream.put(chunk)
    assert await stream.take(100) == [b"", b"1", b"2"], "the first lets the head of the answer go"
    stream.put(b"")
    assert await stream.take(100) == [b""]


@pytest.mark.asyncio
async def test_several_puts_before_the_reader_wakes_are_all_read() -> None:
    stream = Stream(100, lambda: None)
    reader = asyncio.create_task(drain(stream))
    await asyncio.sleep(0)
    stream.put(b"1")
    stream.put(b"2")
    stream.end()
    stream.end(WorkerFailed("after the end nothing counts"))
    assert await reader == [b"1", b"2"]
