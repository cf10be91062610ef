from __future__ import annotations

import asyncio
from http import HTTPStatus

import pytest

from minserve.rank import streaming
from minserve.rank.connection import Disconnected
from minserve.rank.data import Refused
from minserve.rank.inbox import Inbox
from minserve.rank.streaming import Cancelled, Stream, encode
from minserve.wire.frames import Frame, Kind
from minserve.wire.messages import Answers, unpack
from tests.unit.rank.rig import (
    DEADLINE_S,
    SHUTDOWN,
    FakeConnection,
    FakeSlot,
    PacedConnection,
    Running,
    batch,
    cancel,
    grant,
    new_context,
    parts,
    requests,
)


class Streaming:
    """A stream of batch 7 with `count` requests, and what came of it."""

    def __init__(self, *incoming: Frame, count: int = 2, granted: int = 8, answering: bool = True) -> None:
        self.connection = FakeConnection(incoming)
        self.inbox = Inbox(self.connection)
        self.slot = FakeSlot()
        self.context = new_context(*requests(*[b""] * count))
        self.refused: list[str] = []
        self.stream = Stream(
            self.connection,
            self.inbox,
            self.slot,
            self.context,
            7,
            count,
            granted,
            answering,
            lambda refusal, seq: self.refused.append(str(refusal)),
        )

    @property
    def chunks(self) -> list[list[tuple[int, bytes]]]:
        return self.connection.answers(Kind.CHUNK)

    @property
    def steps(self) -> list[int]:
        return [unpack(Answers, frame.meta).step for frame in self.connection.sent]


def test_a_step_is_one_frame_with_a_chunk_for_each_request() -> None:
    it = Streaming()
    it.stream.send(["a", b"b"])
    it.stream.send(["c", "d"])
    assert it.chunks == [[(0, b"a"), (1, b"b")], [(0, b"c"), (1, b"d")]]
    assert it.steps == [1, 2]
    assert it.connection.log == [">CHUNK 7"] * 2


def test_none_is_no_chunk_and_a_step_of_nones_is_told_all_the_same() -> None:
    """The server grants by the steps that it has seen."""
    it = Streaming()
    it.stream.send([None, "b"])
    it.stream.send([None, None])
    it.stream.send(["c", ""])
    assert it.chunks == [[(1, b"b")], [], [(0, b"c"), (1, b"")]]
    assert it.steps == [1, 2, 3]


def test_other_ranks_count_and_send_nothing_whatever_they_are_given() -> None:
    it = Streaming(answering=False)
    for chunks in (["a", "b"], object(), None):
        it.stream.send(chunks)
    assert (it.stream.step, it.connection.sent, it.refused) == (3, [], [])


@pytest.mark.parametrize("bad", [["a"], "ab", None, ["a", object()], ["a", "\ud800"]])
def test_a_bad_chunk_is_reported_once_and_mutes_but_the_steps_go_on(bad: object) -> None:
    it = Streaming()
    it.stream.send(["a", "b"])
    for chunks in (bad, bad, ["c", "d"]):
        it.stream.send(chunks)
    assert len(it.refused) == 1
    assert it.chunks == [[(0, b"a"), (1, b"b")], [], [], []]
    assert (it.stream.step, it.stream.refused) == (4, True)


@pytest.mark.parametrize(
    ("chunks", "indexes", "sent"),
    [
        (["a", "b", "c"], [0, 1, 2], [(0, b"a"), (1, b"b"), (2, b"c")]),
        (["x"], [1], [(1, b"x")]),
        (["x", "y"], [2, 0], [(0, b"y"), (2, b"x")]),
        (["x", None], [2, 0], [(2, b"x")]),
        (("x",), [1], [(1, b"x")]),
    ],
)
def test_chunks_for_some_requests_go_to_those(chunks: object, indexes: list[int], sent: object) -> None:
    it = Streaming(count=3)
    it.stream.send_some(chunks, {index: f"r{index}" for index in indexes})
    assert it.chunks == [sent]


def test_a_context_that_a_handler_has_taken_requests_from_still_says_whose_the_chunks_are() -> None:
    it = Streaming(count=3)
    request_ids = it.context.request_ids
    assert request_ids is not None
    del request_ids[0]
    it.stream.send_some(["x", "y"], request_ids)
    assert it.chunks == [[(1, b"x"), (2, b"y")]]


@pytest.mark.parametrize("request_ids", [{3: "r3"}, {-1: "r2"}, {0: "r0", 1: "of an earlier batch"}])
def test_chunks_of_a_thread_that_an_earlier_batch_left_behind_are_dropped(
    request_ids: dict[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    it = Streaming(count=3)
    it.stream.send_some(["late"] * len(request_ids), request_ids)
    assert (it.refused, it.chunks, it.stream.step) == ([], [], 0)
    assert "not in this batch" in caplog.text


@pytest.mark.parametrize(("chunks", "indexes"), [(["x", "y"], [0]), (["x"], [0, 1]), ("x", [0]), (None, [])])
def test_more_or_fewer_chunks_than_requests_are_refused(chunks: object, indexes: list[int]) -> None:
    it = Streaming(count=3)
    it.stream.send_some(chunks, {index: f"r{index}" for index in indexes})
    assert (len(it.refused), it.chunks, it.stream.step) == (1, [[]], 1)


# ── grants ──


def send(it: Streaming, steps: int) -> None:
    for _ in range(steps):
        it.stream.send(["a", "b"])


@pytest.mark.parametrize("answering", [True, False])
def test_no_step_is_taken_without_a_grant(answering: bool) -> None:
    it = Streaming(batch(8), grant(7, 4), granted=2, answering=answering)
    send(it, 2)
    assert len(it.connection.incoming) == 2  # granted with the batch: nothing is read
    send(it, 2)
    assert not it.connection.incoming
    with pytest.raises(Disconnected):  # it would wait for more
        send(it, 1)
    assert it.stream.step == 4


@pytest.mark.parametrize("answering", [True, False])
def test_a_cancelled_stream_ends_on_every_rank_behind_the_last_granted_step(answering: bool) -> None:
    it = Streaming(grant(7, 3), cancel(7, 3), granted=2, answering=answering)
    send(it, 3)
    for _ in range(2):  # also for a handler that has swallowed it
        with pytest.raises(Cancelled):
            send(it, 1)
    assert it.stream.step == 3
    assert it.stream.cancelled
    assert it.steps == ([1, 2, 3] if answering else [])


def test_a_cancel_that_a_rank_has_read_early_changes_nothing() -> None:
    """A rank that waits for nothing must not leave before one that does."""
    it = Streaming(cancel(7, 2), batch(8), granted=2)
    send(it, 1)
    assert it.inbox.next().seq == 8
    assert it.stream.cancelled
    send(it, 1)
    with pytest.raises(Cancelled):
        send(it, 1)


def test_chunks_for_some_requests_wait_for_grants_too() -> None:
    it = Streaming(cancel(7, 1), granted=1)
    it.stream.send_some(["x"], {1: "r1"})
    for chunks in (["x"], ["too", "many"]):
        with pytest.raises(Cancelled):
            it.stream.send_some(chunks, {1: "r1"})
    assert (it.steps, it.refused) == ([1], [])


def test_a_step_is_shown_before_it_is_waited_for() -> None:
    """The server cancels a stream only once every rank has been seen to take part in it."""
    it = Streaming(cancel(7, 0), granted=0, answering=False)
    with pytest.raises(Cancelled):
        send(it, 1)
    assert it.slot.log == ["step 1 of 7"]


def test_a_rank_whose_chunk_was_refused_runs_to_its_end_with_the_others() -> None:
    it = Streaming(grant(7, 2**62), granted=2)
    send(it, 1)
    it.stream.send(["one too few"])
    send(it, 100)
    assert (it.stream.step, it.steps, len(it.refused)) == (102, list(range(1, 103)), 1)


def test_a_worker_that_ends_ends_its_streams() -> None:
    it = Streaming(SHUTDOWN, granted=1)
    send(it, 1)
    with pytest.raises(Cancelled):
        send(it, 1)
    assert not it.stream.cancelled  # by its clients it is not


@pytest.mark.parametrize("bad", [False, True])
def test_nothing_goes_out_behind_the_end_of_a_batch(bad: bool) -> None:
    it = Streaming(cancel(7, 2), granted=2)
    send(it, 1)
    it.stream.end()
    it.stream.send(["one too few"] if bad else ["a", "b"])
    assert (it.stream.step, it.steps, it.refused) == (2, [1], [])
    with pytest.raises(Cancelled):  # a thread that is still at it leaves with those of the other ranks
        send(it, 1)


def test_a_thread_that_waits_for_a_grant_when_its_batch_ends_is_let_go() -> None:
    connection = PacedConnection()
    it = Streaming(granted=0)
    it.stream._inbox = inbox = Inbox(connection)
    thread = Running(send, it, 1)
    assert connection.read.wait(DEADLINE_S)
    it.stream.end()
    inbox.finished(7)
    connection.give(batch(8))
    thread.result()
    assert it.connection.sent == []
    assert inbox.next().seq == 8


# ── what can be sent ──


def test_status_and_headers_are_those_of_the_moment() -> None:
    it = Streaming(count=1)
    it.context.set_response_status(201, "Made")
    it.context.set_response_header(0, "x-a", "1")
    it.stream.send(["a"])
    it.context.set_response_status(500, "too late")
    it.stream.send(["b"])
    (first, _), (second, _) = (parts(frame)[0] for frame in it.connection.sent)
    assert (first.status, first.reason, first.headers) == (201, "Made", (("x-a", "1"),))
    assert second.status == 500


@pytest.mark.parametrize("status", [200, 299, 418, 599, HTTPStatus.NOT_FOUND])
def test_a_status_from_200_to_599_can_be_sent(status: int) -> None:
    context = new_context(*requests(b""))
    context.set_response_status(status)
    assert encode(context, 0, "")[0].status == status


@pytest.mark.parametrize("status", [0, 100, 199, 600, -1, True, "200", 200.0, None])
def test_any_other_status_is_refused(status: int) -> None:
    context = new_context(*requests(b""))
    context.set_response_status(status)
    with pytest.raises(Refused, match=f"answer 0: response status {status!r} is not a number from 200 to 599"):
        encode(context, 0, "")


@pytest.mark.parametrize("phrase", ["a\r\nb", "a\nb", "\0", "\ud800", 7, b"x"])
def test_a_phrase_that_would_break_the_answer_is_refused(phrase: str) -> None:
    context = new_context(*requests(b""))
    context.set_response_status(200, phrase)
    with pytest.raises(Refused, match="answer 0: bad reason phrase"):
        encode(context, 0, "")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", "a\r\nset-cookie: b", "bad response header"),
        ("x", "a\nb", "bad response header"),
        ("x", "\0", "bad response header"),
        ("x", "\udcff", "bad response header"),
        ("x\r\ny", "a", "bad response header"),
        ("x y", "a", "bad response header"),
        ("x:", "a", "bad response header"),
        ("", "a", "bad response header"),
        ("ä", "a", "bad response header"),
        ("x", 7, "response header 'x' must be text, it is of type int"),
        ("x", None, "of type NoneType"),
        (7, "a", "must be text"),
    ],
)
def test_a_header_that_would_break_the_answer_is_refused(name: str, value: str, message: str) -> None:
    context = new_context(*requests(b"", b""))
    context.set_response_header(1, name, value)
    assert encode(context, 0, "fine")[1] == b"fine"
    with pytest.raises(Refused, match=f"answer 1: .*{message}" if "bad" in message else message):
        encode(context, 1, "")


def test_the_stream_of_a_context_is_its_own_or_else_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, own = Streaming(), Streaming()
    monkeypatch.setattr(streaming, "_current", ranks.stream)
    assert streaming.stream_of(None) is ranks.stream
    assert streaming.stream_of(own.context) is ranks.stream
    own.context.stream = own.stream
    assert streaming.stream_of(own.context) is own.stream


def test_a_coroutine_sends_at_once_what_is_granted_and_else_from_a_thread() -> None:
    """A grant that another one has read counts as well."""
    it = Streaming(grant(7, 3), granted=1)
    threads: list[bool] = []

    async def send() -> None:
        for _ in range(3):
            before = len(it.connection.log)
            await it.stream.send_from_coroutine(["a", "b"])
            threads.append("<GRANT 7" in it.connection.log[before:])

    asyncio.run(send())
    assert threads == [False, True, False]
    assert it.steps == [1, 2, 3]
