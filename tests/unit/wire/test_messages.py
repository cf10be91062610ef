from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minserve.errors import WireError
from minserve.wire import messages
from minserve.wire.frames import FROM_SERVER, FrameReader, Kind
from minserve.wire.messages import (
    Answer,
    Answers,
    Batch,
    Buffer,
    Failure,
    Hello,
    Load,
    Loaded,
    Message,
    Metric,
    Metrics,
    Part,
    Progress,
    RequestMeta,
    Shared,
    Shutdown,
    Step,
    decode_requests,
    inline_lengths,
    new_batch,
    pack,
    pack_with_body,
    split_body,
    unpack,
)
from tests.fakes import feed

REQUEST = RequestMeta(
    "id-1", ((b"Accept", b"*/*"), (b"X", b"\xff")), (Part("body", "text/plain", 3),), "a/b", "explain"
)
EXAMPLES: list[Message] = [
    Hello(1, 1, 2, 4711, "w1", "secret"),
    Progress("weights", 3, 12),
    Loaded(1.5, probes=True),
    Failure("own", "ValueError", "no ä", "/a.py:3", "Traceback …", 1, (0, 1), 418),
    Answers(
        (Answer(0, 2, 404, "Not here", (("a", "b"), ("a", "c"))), Answer(3, 0)), step=9, shared=(Shared(1, 7, 2**40),)
    ),
    Metrics((Metric("PredictionTime", 1.5, "ms", "gauge", (("ModelName", "m"),), "id-1,id-2", 1.7e9),)),
    Load(
        "m",
        "1.0",
        "/m",
        "handler.py:H",
        8,
        True,
        False,
        "{}",
        "json",
        False,
        False,
        "rank0",
        "[]",
        True,
        2,
        True,
        0.001,
        True,
    ),
    new_batch((REQUEST, RequestMeta("id-2", (), ())), 4, (Shared(0, 1, 2), Shared(3, 4, 5))),
    Step(2**40),
    Shutdown("drain"),
]


def test_the_examples_cover_every_message() -> None:
    inside_others = {Answer, Metric, Part, RequestMeta, Shared}
    ours = {kind for kind in Message.__subclasses__() if kind.__module__ == messages.__name__}
    assert {type(example) for example in EXAMPLES} == ours - inside_others


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_went(message: Message) -> None:
    (frame,) = feed(FrameReader(0, frozenset(Kind)), pack(Kind.LOAD, message, seq=3, flags=1))
    assert (frame.kind, frame.seq, frame.flags, bytes(frame.body)) == (Kind.LOAD, 3, 1, b"")
    assert unpack(type(message), frame.meta) == message


def test_a_rank_reads_a_batch_as_it_was_sent_and_its_requests_when_asked_for() -> None:
    sent = new_batch(both := (REQUEST, RequestMeta("id-2", (), ())), 4, (Shared(0, 1, 2),))
    (frame,) = feed(FrameReader(0, frozenset(Kind)), pack(Kind.BATCH, sent))
    taken = unpack(Batch, frame.meta)
    assert (taken.grant, taken.shared, taken.parts) == (4, sent.shared, (REQUEST.parts, ()))
    assert decode_requests(taken.requests) == both
    with pytest.raises(WireError, match="bad requests"):
        decode_requests(b"\x91\x90")


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_field_of_a_wrong_type_is_a_wire_error(message: Message) -> None:
    fields = list(msgspec.to_builtins(message))
    kind = type(message)
    for index in range(len(fields)):
        wrong = [*fields[:index], {"not": "this"}, *fields[index + 1 :]]
        with pytest.raises(WireError, match=f"bad {kind.__name__} message"):
            unpack(kind, msgspec.msgpack.encode(wrong))


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        b"\xc1",  # no msgpack at all
        msgspec.msgpack.encode([]),  # a field is missing
        msgspec.msgpack.encode({"step": 1}),  # a map
        msgspec.msgpack.encode(["1"]),  # text for a number
        msgspec.msgpack.encode([True]),
        msgspec.msgpack.encode([1.5]),
        msgspec.msgpack.encode([1]) + b"\x00",  # something behind it
        msgspec.msgpack.encode([1])[:-1],  # cut short
        b"\x91\xa2\xff\xff",  # text that is not UTF-8
    ],
)
def test_what_is_no_step_is_a_wire_error(meta: bytes) -> None:
    with pytest.raises(WireError, match="bad Step message"):
        unpack(Step, meta)


@given(meta=st.binary(max_size=60), kind=st.sampled_from([type(example) for example in EXAMPLES]))
def test_random_meta_raises_nothing_but_wire_errors(meta: bytes, kind: type[Message]) -> None:
    with contextlib.suppress(WireError):
        assert isinstance(unpack(kind, meta), kind)


def test_bodies_are_neither_joined_nor_copied() -> None:
    bodies: list[Buffer] = [b"abc", bytearray(b"defg"), memoryview(b"hi")]
    first, *rest = pack_with_body(Kind.BATCH, new_batch((REQUEST,)), bodies, seq=9, flags=2)
    assert all(piece is body for piece, body in zip(rest, bodies, strict=True))
    (frame,) = feed(FrameReader(100, FROM_SERVER), b"".join([first, *rest]))
    assert (frame.seq, frame.flags, bytes(frame.body)) == (9, 2, b"abcdefghi")
    assert unpack(Batch, frame.meta) == new_batch((REQUEST,))


def test_empty_bodies_make_no_pieces() -> None:
    """`sendmsg` takes a limited number of pieces, and a batch of requests without bodies should be one."""
    assert len(pack_with_body(Kind.BATCH, new_batch(()), [b"", b"x", bytearray()], seq=1)) == 2


def test_split_body_gives_pieces_of_their_own() -> None:
    body = bytearray(b"abcdef")
    first, empty, second = split_body(body, [2, 0, 4])
    assert (bytes(first), bytes(empty), bytes(second)) == (b"ab", b"", b"cdef")
    first[0] = ord("X")
    assert body == b"abcdef"


def test_a_body_of_one_piece_is_not_copied() -> None:
    body = bytearray(b"abcdef")
    (piece,) = split_body(body, [6])
    assert piece is body


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([7], "reach over its body of 6 bytes"),
        ([3, 4], "reach over its body of 6 bytes"),
        ([-1, 7], "reach over"),
        ([7, -1], "reach over"),
        ([2**70], "reach over"),
        ([3, 2], "add up to 5 bytes, its body has 6"),
        ([], "add up to 0 bytes, its body has 6"),
    ],
)
def test_lengths_that_do_not_cover_the_body_are_refused(lengths: list[int], message: str) -> None:
    with pytest.raises(WireError, match=message):
        split_body(bytearray(6), lengths)


def test_what_is_in_shared_memory_takes_no_bytes_of_the_frame() -> None:
    assert inline_lengths(iter([3, 100_000, 5]), (Shared(1, 0, 1),)) == [3, 0, 5]
    assert inline_lengths([3, 5], ()) == [3, 5]


@pytest.mark.parametrize("index", [-1, 2, 2**70])
def test_a_part_in_shared_memory_that_is_none_of_the_frame_is_refused(index: int) -> None:
    with pytest.raises(WireError, match="is said to be in shared memory"):
        inline_lengths([3, 5], (Shared(index, 0, 1),))
