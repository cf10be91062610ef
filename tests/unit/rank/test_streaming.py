from __future__ import annotations

from http import HTTPStatus

import pytest

from minserve.rank.data import Refused
from minserve.rank.streaming import Stream, encode
from minserve.wire.frames import Kind
from minserve.wire.messages import Answers, unpack
from tests.unit.rank.rig import FakeConnection, new_context, parts, requests


class Streaming:
    """A stream of a batch of `count`, and what came of it."""

    def __init__(self, count: int = 2, answering: bool = True) -> None:
        self.connection = FakeConnection()
        self.context = new_context(*requests(*[b""] * count))
        self.refused: list[str] = []
        self.stream = Stream(
            self.connection, self.context, 7, count, answering, lambda refusal: self.refused.append(str(refusal))
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


def test_none_is_no_chunk_and_a_step_of_nones_is_counted_but_not_sent() -> None:
    it = Streaming()
    it.stream.send([None, "b"])
    it.stream.send([None, None])
    it.stream.send(["c", ""])
    assert it.chunks == [[(1, b"b")], [(0, b"c"), (1, b"")]]
    assert it.steps == [1, 3]


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
    assert it.chunks == [[(0, b"a"), (1, b"b")]]
    assert (it.stream.step, it.stream.muted) == (4, True)


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
    assert (len(it.refused), it.chunks, it.stream.step) == (1, [], 1)


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
