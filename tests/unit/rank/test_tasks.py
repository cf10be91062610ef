"""A rank that works on several batches at once, over a real pair of sockets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import minserve
from minserve.errors import WireError
from minserve.wire.frames import Frame, Kind
from minserve.wire.messages import Answers, Failure, Metrics, unpack
from tests.unit.rank.rig import (
    SHUTDOWN,
    Peer,
    batch,
    cancel,
    grant,
    parts,
    probe,
    resume,
    words,
)

Serve = Callable[..., Peer]


@pytest.fixture
def serve(model_dir: Path) -> Iterator[Serve]:
    started: list[Peer] = []

    def start(source: str, **options: Any) -> Peer:
        started.append(Peer(model_dir, source, 1, asynchronous=True, **options))
        return started[-1]

    yield start
    for peer in started:
        peer.close()


# A body is `name` or `name>other`: waits to be told by the request that carries its name, and tells the other.
MEETING = """
    import asyncio
    import minserve
    told = {}
    def place(name):
        return told.setdefault(name, asyncio.get_running_loop().create_future())
    async def handle(data, context):
        if data is None: return
        name, _, other = bytes(data[0]["body"]).decode().partition(">")
        if other:
            place(other).set_result(name)
            return [name]
        return [await place(name) + " told " + name]
"""


def test_answers_leave_when_they_are_ready(serve: Serve) -> None:
    peer = serve(MEETING)
    peer.give(batch(1, b"a"), batch(2, b"b"), batch(3, b"c>b"))
    assert words([peer.next(), peer.next()]) == ["REPLY 3 c", "REPLY 2 c told b"]
    peer.give(batch(4, b"d>a"))
    assert words([peer.next(), peer.next()]) == ["REPLY 4 d", "REPLY 1 d told a"]
    peer.give(SHUTDOWN)
    assert peer.rank.result() == 0
    assert peer.slot.log[-1] == "finished 4"


def test_each_request_has_a_context_of_its_own(serve: Serve) -> None:
    source = """
        import asyncio
        class Model:
            def initialize(self, context):
                context.cache = {}
                self.both = None
            async def handle(self, data, context):
                context.set_response_status(int(bytes(data[0]["body"])))
                context.cache[context.get_request_id()] = 1
                if self.both is None:
                    self.both = asyncio.get_running_loop().create_future()
                    await self.both
                else:
                    self.both.set_result(None)
                return [len(context.cache)]
    """
    peer = serve(source)
    peer.give(batch(1, b"201"), batch(2, b"202"))
    answers = sorted((one.seq, *parts(one)[0]) for one in (peer.next(), peer.next()))
    assert [(seq, answer.status, body) for seq, answer, body in answers] == [(1, 201, b"1"), (2, 202, b"1")]


@pytest.mark.parametrize("how", ["context", "no context", "thread"])
def test_torchserves_function_finds_the_stream_of_its_own_request(
    serve: Serve, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(minserve.__file__).parent / "compat")
    call = {
        "context": "send([body], context.request_ids, 'ok', 200, context)",
        "no context": "send([body], context.request_ids, 'ok', 200)",
        "thread": "await asyncio.to_thread(send, [body], context.request_ids, 'ok', 200)",
    }[how]
    source = f"""
        import asyncio
        from ts.handler_utils.utils import send_intermediate_predict_response as send
        async def handle(data, context):
            if data is None: return
            body = bytes(data[0]["body"])
            for _ in range(2):
                {call}
                await asyncio.sleep(0)
            return [b"last"]
    """
    peer = serve(source)
    peer.give(batch(1, b"a"), batch(2, b"b"))
    frames = words([peer.next() for _ in range(6)])
    for seq, chunk in ((1, "a"), (2, "b")):
        assert [one for one in frames if f" {seq} " in one] == [f"CHUNK {seq} {chunk}"] * 2 + [f"REPLY {seq} last"]


STREAMS = {
    "async generator": "yield ['{}']",
    "send": "send(['{}'], context.request_ids, 'ok', 200, context)",
}


@pytest.mark.parametrize("how", STREAMS)
def test_steps_wait_for_their_grant_and_hold_up_nobody_else(
    serve: Serve, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(minserve.__file__).parent / "compat")
    steps = "\n            ".join(STREAMS[how].format(letter) for letter in "abc")
    source = f"""
        import minserve
        from ts.handler_utils.utils import send_intermediate_predict_response as send
        async def handle(data, context):
            {steps}
            minserve.report_progress("all sent")
    """
    peer = serve(source)
    peer.give(batch(1, b"", grant=1), batch(2, b"", grant=3))
    first = peer.until(Kind.REPLY)
    assert sorted(words(first)) == sorted(["CHUNK 1 a", "CHUNK 2 a", "CHUNK 2 b", "CHUNK 2 c", "REPLY 2 "])
    peer.give(grant(1, 2), grant(1, 3))
    assert words(peer.until(Kind.REPLY)) == ["CHUNK 1 b", "CHUNK 1 c", "REPLY 1 "]


def test_a_plain_handler_and_a_generator_are_served_as_well(serve: Serve) -> None:
    source = """
        def handle(data, context):
            if data is None: return
            return chunks() if data[0]["body"] == b"stream" else ["plain"]
        def chunks():
            yield ["a"]
            return ["b"]
    """
    peer = serve(source)
    peer.give(batch(1, b"stream"), batch(2, b""))
    frames = words([peer.next() for _ in range(3)])
    assert sorted(frames) == ["CHUNK 1 a", "REPLY 1 b", "REPLY 2 plain"]


CANCELLED = """
    import asyncio
    import minserve
    async def handle(data, context):
        if data is None: return
        if data[0]["body"] == b"ok": return ["ok"]
        try:
            {wait}
        except {error}:
            minserve.report_progress("cleaned up")
            {then}
"""


@pytest.mark.parametrize("wait", ["await asyncio.get_running_loop().create_future()", "async for _ in endless(): pass"])
def test_a_request_whose_client_has_left_is_cancelled_whatever_it_waits_for(serve: Serve, wait: str) -> None:
    source = CANCELLED.format(wait=wait, error="asyncio.CancelledError", then="raise")
    peer = serve(
        source
        + "\n    async def endless():\n        while True:\n            await asyncio.sleep(0)\n            yield 1"
    )
    peer.give(batch(1, b""), batch(2, b"ok"))
    assert words(peer.until(Kind.REPLY)) == ["REPLY 2 ok"]
    peer.give(cancel(1, 8))
    assert peer.stage() == "cleaned up"
    error = peer.next()
    failure = unpack(Failure, error.meta)
    assert (error.kind, error.seq, failure.kind, failure.needs) == (Kind.ERROR, 1, "cancelled", (0,))
    peer.give(resume(1), cancel(1, 8), grant(1, 9), batch(3, b"ok"))  # what comes too late is for nobody
    assert words(peer.until(Kind.REPLY)) == ["REPLY 3 ok"]


def test_a_stream_whose_client_has_left_ends_also_where_it_waits_for_its_grant(serve: Serve) -> None:
    source = """
        import minserve
        async def handle(data, context):
            try:
                while True: yield ["a"]
            finally:
                minserve.report_progress("cleaned up")
    """
    peer = serve(source)
    peer.give(batch(1, b"", grant=1))
    assert words(peer.until(Kind.CHUNK)) == ["CHUNK 1 a"]
    peer.give(cancel(1, 1))
    assert peer.stage() == "cleaned up"
    assert unpack(Failure, peer.next().meta).kind == "cancelled"


def test_what_a_handler_returns_that_swallows_its_cancel_is_for_nobody(serve: Serve) -> None:
    wait = "await asyncio.get_running_loop().create_future()"
    peer = serve(CANCELLED.format(wait=wait, error="asyncio.CancelledError", then="return ['kept']"))
    peer.give(batch(1, b""), cancel(1, 8))  # in one read: the cancel must not come before the beginning
    assert peer.stage() == "cleaned up"
    assert unpack(Failure, peer.next().meta).kind == "cancelled"


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ("raise LookupError('gone')", "own", "gone"),
        ("raise asyncio.CancelledError", "own", ""),
        ("raise minserve.Cancelled", "own", ""),
        ("return 'no list'", "refused", "handle must return a list"),
        ("return [{1}]", "refused", "answer 0 is of type set"),
    ],
)
def test_a_failure_is_its_own_requests_alone(serve: Serve, body: str, kind: str, text: str) -> None:
    source = f"""
        import asyncio, minserve
        async def handle(data, context):
            if data is None: return
            if data[0]["body"] == b"ok": return ["ok"]
            {body}
    """
    peer = serve(source)
    peer.give(batch(1, b""), batch(2, b"ok"))
    (error,) = peer.until(Kind.ERROR)
    failure = unpack(Failure, error.meta)
    assert (error.seq, failure.kind) == (1, kind)
    assert text in failure.text
    assert words(peer.until(Kind.REPLY)) == ["REPLY 2 ok"]


def test_metrics_go_in_front_of_the_answer_they_belong_to(serve: Serve) -> None:
    source = """
        async def handle(data, context):
            if data: context.metrics.add_counter("mine", 1)
            return ["ok"]
    """
    declared = [{"name": "PredictionTime", "type": "gauge", "unit": "ms", "dimensions": ["ModelName", "Level"]}]
    peer = serve(source, metrics=json.dumps(declared))
    peer.give(batch(1, b""))
    recorded, reply = peer.next(), peer.next()
    assert (recorded.kind, reply.kind) == (Kind.METRICS, Kind.REPLY)
    names = [(one.name, one.request_id) for one in unpack(Metrics, recorded.meta).metrics]
    assert names == [("mine", "r0")]
    assert unpack(Answers, reply.meta).seconds > 0


def test_a_probe_is_answered(serve: Serve) -> None:
    peer = serve("async def handle(data, context): ...\ndef probe(): return True")
    peer.give(probe(1))
    assert words(peer.until(Kind.REPLY)) == ["REPLY 1 "]


def test_a_shutdown_ends_what_is_under_way_and_closes_the_handler(serve: Serve, model_dir: Path) -> None:
    wait = "await asyncio.get_running_loop().create_future()"
    source = CANCELLED.format(wait=wait, error="asyncio.CancelledError", then="raise")
    peer = serve(source + "\n    async def close(): open('closed', 'x').close()")
    peer.give(batch(1, b""), batch(2, b"ok"))
    peer.until(Kind.REPLY)
    peer.give(SHUTDOWN)
    assert peer.rank.result() == 0
    assert (model_dir / "closed").exists()


def test_a_batch_out_of_sequence_stops_the_rank(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    peer = serve(MEETING)
    peer.give(batch(2, b""))
    assert peer.rank.result() == 1
    assert capfd.readouterr().err == "minserve: rank 0 stops: got batch 2 after batch 0\n"


def test_a_link_that_ends_ends_the_rank_quietly(serve: Serve) -> None:
    peer = serve(MEETING)
    peer.give(batch(1, b"a"))
    peer.hang_up()
    assert peer.rank.result() == 0


def test_a_frame_that_is_none_ends_the_rank(serve: Serve) -> None:
    peer = serve(MEETING)
    peer.give(Frame(Kind.BATCH, 0, 1, bytearray(b"\xc1"), bytearray()))
    with pytest.raises(WireError, match="bad Batch message"):
        peer.rank.result()
