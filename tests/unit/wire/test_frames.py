from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minserve.errors import WireError
from minserve.wire import frames
from minserve.wire.frames import (
    FROM_FRONTEND,
    FROM_RANK,
    FROM_SERVER,
    HEADER,
    MAGIC,
    SCRATCH_BYTES,
    TO_FRONTEND,
    Frame,
    FrameReader,
    Kind,
    encode,
)
from tests.fakes import feed

ALL = frozenset(Kind)
SMALL_SCRATCH = 64  # makes "large" frames small enough to try every size and split


@pytest.fixture
def small_scratch() -> Iterator[None]:
    with mock.patch.object(frames, "SCRATCH_BYTES", SMALL_SCRATCH):
        yield


def reader(max_body: int = 2**24, kinds: frozenset[Kind] = ALL, max_meta: int = 2**24) -> FrameReader:
    return FrameReader(max_body, kinds, max_meta)


def read(pieces: Sequence[bytes]) -> list[Frame]:
    """What a fresh reader makes of a stream that arrives in pieces; the stream must end between two frames."""
    fresh = reader()
    result = [frame for piece in pieces for frame in feed(fresh, piece)]
    assert not fresh.midway
    return result


def pattern(length: int, start: int = 0) -> bytes:
    """Bytes of which no two neighbouring runs are alike, so that a wrong offset shows."""
    return bytes((start + i * 7 + i // 251) % 256 for i in range(length))


THREE = [
    Frame(Kind.BATCH, 1, 2**64 - 1, bytearray(b"meta"), bytearray(b"the body")),
    Frame(Kind.SHUTDOWN, 0, 0, bytearray(), bytearray()),
    Frame(Kind.REPLY, 255, 7, bytearray(), bytearray(b"\x53\x4d" * 5)),
]


def wire(*messages: Frame) -> bytes:
    return b"".join(encode(f.kind, f.seq, bytes(f.meta), bytes(f.body), f.flags) for f in messages)


def test_a_header_lies_on_the_wire_as_documented() -> None:
    assert encode(Kind.BATCH, 0x0102030405060708, b"mm", b"bbb", 9) == (
        b"SM"
        + b"\x21\x09"
        + b"\x02\0\0\0"
        + b"\x08\x07\x06\x05\x04\x03\x02\x01"
        + b"\x03\0\0\0\0\0\0\0"
        + b"mm"
        + b"bbb"
    )


def test_every_kind_belongs_to_one_direction() -> None:
    directions = (FROM_RANK, FROM_SERVER, FROM_FRONTEND, TO_FRONTEND)
    assert frozenset().union(*directions) == ALL
    assert sum(map(len, directions)) == len(ALL)


def test_several_frames_in_one_read_come_out_in_order() -> None:
    assert read([wire(*THREE)]) == THREE


def test_split_in_two_at_every_byte() -> None:
    stream = wire(*THREE)
    for cut in range(1, len(stream)):
        assert read([stream[:cut], stream[cut:]]) == THREE, cut


def test_one_byte_at_a_time() -> None:
    assert read([bytes([byte]) for byte in wire(*THREE)]) == THREE


def test_an_end_at_every_offset_is_midway_unless_it_is_between_frames() -> None:
    stream = wire(*THREE)
    borders = {0, *itertools.accumulate(len(wire(frame)) for frame in THREE)}
    for end in range(len(stream) + 1):
        fresh = reader()
        feed(fresh, stream[:end])
        assert fresh.midway == (end not in borders), end


@pytest.mark.usefixtures("small_scratch")
def test_an_end_inside_a_large_frame_is_midway() -> None:
    stream = encode(Kind.BATCH, 1, pattern(100), pattern(100))
    for end in range(1, len(stream)):
        fresh = reader()
        assert feed(fresh, stream[:end]) == []
        assert fresh.midway, end


@pytest.mark.usefixtures("small_scratch")
@pytest.mark.parametrize("before", [0, 1, 30])
@pytest.mark.parametrize("meta", [0, 1, 39, 40, 41, 100])
@pytest.mark.parametrize("body", [0, 1, 39, 40, 41, 200])
def test_frames_around_the_size_of_the_scratch_survive_every_split(before: int, meta: int, body: int) -> None:
    """40 bytes fit behind a header in this scratch; a frame in front and one behind show that nothing spills over."""
    messages = [
        Frame(Kind.LOAD, 0, 0, bytearray(pattern(before, 3)), bytearray()),
        Frame(Kind.BATCH, 0, 5, bytearray(pattern(meta, 1)), bytearray(pattern(body, 2))),
        Frame(Kind.CONTINUE, 0, 6, bytearray(b"x"), bytearray()),
    ]
    stream = wire(*messages)
    for cut in range(1, len(stream)):
        assert read([stream[:cut], stream[cut:]]) == messages, cut


@pytest.mark.parametrize(
    ("meta", "body"),
    [
        (0, SCRATCH_BYTES - HEADER.size),  # just fits
        (0, SCRATCH_BYTES - HEADER.size + 1),
        (SCRATCH_BYTES * 2, 0),
        (SCRATCH_BYTES + 5, SCRATCH_BYTES * 3 + 1),
    ],
)
def test_real_sizes_around_the_scratch(meta: int, body: int) -> None:
    message = Frame(Kind.BATCH, 0, 1, bytearray(pattern(1) * meta), bytearray(b"b" * body))
    stream = wire(THREE[0], message, THREE[2])
    cuts = range(0, len(stream), SCRATCH_BYTES // 3)
    assert read([stream[cut : cut + SCRATCH_BYTES // 3] for cut in cuts]) == [THREE[0], message, THREE[2]]


@pytest.mark.usefixtures("small_scratch")
def test_a_large_body_is_read_into_the_memory_it_stays_in() -> None:
    fresh = reader()
    assert feed(fresh, encode(Kind.BATCH, 1, b"m", bytes(200))[:-150]) == []
    view = fresh.buffer()
    assert len(view) == 150  # never more than this frame: the next one must not land in its memory
    view[:] = pattern(150)
    (frame,) = fresh.received(150)
    assert frame.body == bytes(50) + pattern(150)
    assert view.obj is frame.body


def test_a_receiver_may_keep_and_change_a_body() -> None:
    fresh = reader()
    (first,) = feed(fresh, wire(THREE[0]))
    (second,) = feed(fresh, wire(THREE[0]))
    first.body[:] = b"overwritten, and longer"
    assert second == THREE[0]


@pytest.mark.parametrize("cut", range(HEADER.size + 1))
def test_bad_magic_is_refused(cut: int) -> None:
    data = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    fresh = reader()
    assert feed(fresh, data[: min(cut, HEADER.size - 1)]) == []
    with pytest.raises(WireError, match="not a minserve frame: it starts with 0x4547"):
        feed(fresh, data[min(cut, HEADER.size - 1) :])


def test_garbage_behind_good_frames_costs_none_of_them() -> None:
    fresh = reader()
    data = wire(*THREE) + b"!" * HEADER.size
    fresh.buffer()[: len(data)] = data
    got: list[Frame] = []
    with pytest.raises(WireError):
        got.extend(fresh.received(len(data)))  # extend keeps what came before the error
    assert got == THREE


@pytest.mark.parametrize("kind", [Kind.BATCH, 0, 31, 255])
def test_a_kind_that_the_other_end_may_not_send_is_refused(kind: int) -> None:
    with pytest.raises(WireError, match=f"frame kind {int(kind)} is not allowed here"):
        feed(reader(kinds=FROM_RANK), HEADER.pack(MAGIC, kind, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("meta", "body", "message"),
    [
        (11, 0, "frame meta of 11 bytes, at most 10 are allowed"),
        (2**32 - 1, 0, "frame meta of 4294967295 bytes"),
        (0, 21, "frame body of 21 bytes, at most 20 are allowed"),
        (0, 2**64 - 1, "frame body of 18446744073709551615 bytes"),
    ],
)
def test_lengths_over_the_limits_are_refused_on_the_header_alone(meta: int, body: int, message: str) -> None:
    with mock.patch.object(FrameReader, "_begin_large") as set_aside, pytest.raises(WireError, match=message):
        feed(reader(max_body=20, max_meta=10), HEADER.pack(MAGIC, Kind.BATCH, 0, meta, 1, body))
    set_aside.assert_not_called()


def test_lengths_at_the_limits_are_allowed() -> None:
    (frame,) = feed(reader(max_body=20, max_meta=10), encode(Kind.BATCH, 1, bytes(10), bytes(20)))
    assert (len(frame.meta), len(frame.body)) == (10, 20)


MESSAGES = st.builds(
    Frame,
    kind=st.sampled_from(Kind),
    flags=st.integers(0, 255),
    seq=st.integers(0, 2**64 - 1),
    meta=st.binary(max_size=150).map(bytearray),
    body=st.binary(max_size=150).map(bytearray),
)


def split(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


@given(messages=st.lists(MESSAGES, max_size=6), cuts=st.lists(st.integers(0, 2000), max_size=8))
def test_round_trip_with_any_splits(messages: list[Frame], cuts: list[int]) -> None:
    with mock.patch.object(frames, "SCRATCH_BYTES", SMALL_SCRATCH):
        assert read(split(wire(*messages), cuts)) == messages


@given(
    messages=st.lists(MESSAGES, min_size=1, max_size=4),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 2000), max_size=4),
)
def test_damaged_bytes_raise_nothing_but_wire_errors(
    messages: list[Frame], changes: list[tuple[int, int]], cuts: list[int]
) -> None:
    damaged = bytearray(wire(*messages))
    for offset, byte in changes:
        damaged[offset % len(damaged)] = byte
    with mock.patch.object(frames, "SCRATCH_BYTES", SMALL_SCRATCH):
        fresh = reader(max_body=2**16, max_meta=2**16)
        try:
            for piece in split(bytes(damaged), cuts):
                for frame in feed(fresh, piece):
                    assert len(frame.meta) + len(frame.body) <= len(damaged)
        except WireError:
            pass
