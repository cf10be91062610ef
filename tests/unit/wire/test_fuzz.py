"""Whatever bytes a rank sends: frames or a WireError, never more memory than allowed, never an answer to somebody else."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minserve.wire.frames import FROM_RANK, HEADER, MAGIC, SCRATCH_BYTES, Frame, Kind, encode
from minserve.wire.messages import Answer, Answers, Failure, pack, pack_with_body
from tests.chaos.wire import BATCHES, MAX_BODY, MAX_META, RANKS, LyingGroup, lie, read, seeds, unpack_all

SEQS = st.one_of(st.integers(0, BATCHES + 1), st.integers(0, 2**64 - 1))
FRAMES = st.builds(
    lambda kind, seq, meta, body, flags: encode(kind, seq, meta, body, flags),
    st.sampled_from(sorted(FROM_RANK)),
    SEQS,
    st.binary(max_size=60),
    st.binary(max_size=60),
    st.integers(0, 255),
)

# A value of any kind and shape that msgpack has.
PACKED: st.SearchStrategy[object] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.binary(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=12,
)


@given(st.lists(FRAMES, max_size=4))
def test_a_stream_split_at_every_byte_gives_the_same_frames(frames: list[bytes]) -> None:
    stream = b"".join(frames)
    whole = read([stream], SCRATCH_BYTES)
    assert whole[1] == ""
    assert len(whole[0]) == len(frames)
    assert read([stream]) == whole
    assert read([bytes([byte]) for byte in stream]) == whole
    for cut in range(1, len(stream)):
        assert read([stream[:cut], stream[cut:]]) == whole


@given(st.lists(FRAMES, max_size=6), st.lists(st.integers(0, 2**16), max_size=8))
def test_a_stream_split_anywhere_gives_the_same_frames(frames: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(frames)
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    assert read([stream[a:b] for a, b in itertools.pairwise(edges)]) == read([stream])


def flip(stream: bytes, at: int, byte: int) -> bytes:
    return stream[:at] + bytes([stream[at] ^ (byte or 1)]) + stream[at + 1 :] if at < len(stream) else stream


def cut(stream: bytes, at: int, byte: int) -> bytes:
    return stream[:at] + stream[at + byte :]


def insert(stream: bytes, at: int, byte: int) -> bytes:
    return stream[:at] + bytes([byte]) * (byte % 9 + 1) + stream[at:]


MUTATIONS = st.lists(
    st.tuples(st.sampled_from([flip, cut, insert]), st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=5
)
Mutation = tuple[Callable[[bytes, int, int], bytes], int, int]


def mutate(stream: bytes, mutations: list[Mutation]) -> bytes:
    for change, at, byte in mutations:
        stream = change(stream, at % (len(stream) + 1), byte)
    return stream


@given(st.lists(FRAMES, min_size=1, max_size=4), MUTATIONS, st.integers(1, 100))
def test_a_damaged_stream_gives_frames_or_a_wire_error_however_it_is_split(
    frames: list[bytes], mutations: list[Mutation], size: int
) -> None:
    """`read` lets nothing but a WireError pass, and looks at the memory."""
    stream = mutate(b"".join(frames), mutations)
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    assert read(pieces) == read([stream]) == read([stream], SCRATCH_BYTES)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.sampled_from(sorted(FROM_RANK)))
def test_lengths_over_the_limits_are_a_wire_error_and_cost_no_memory(meta: int, body: int, kind: Kind) -> None:
    _, error = read([HEADER.pack(MAGIC, kind, 0, meta, 1, body)])
    assert bool(error) == (meta > MAX_META or body > MAX_BODY)


@given(st.one_of(st.binary(max_size=200), PACKED.map(msgspec.msgpack.encode)))
def test_any_bytes_are_a_message_or_a_wire_error(meta: bytes) -> None:
    unpack_all(meta)


ANSWERS = st.lists(
    st.builds(Answer, st.integers(-1, 3), st.integers(-1, 4), st.sampled_from([200, 404, -1]), st.text(max_size=3)),
    max_size=3,
).map(tuple)


@st.composite
def answering(draw: st.DrawFn) -> bytes:
    """A REPLY or CHUNK whose meta is well formed, with indexes and lengths that may or may not be right."""
    kind, body = draw(st.sampled_from([Kind.REPLY, Kind.CHUNK])), draw(st.binary(max_size=6))
    message = Answers(draw(ANSWERS), draw(st.integers(-1, 9)))
    return b"".join(map(bytes, pack_with_body(kind, message, [body], draw(SEQS))))


@st.composite
def right_answers(draw: st.DrawFn) -> bytes:
    """A good REPLY, so that what follows it meets a batch that is over."""
    one, two = draw(st.binary(max_size=3)), draw(st.binary(max_size=3))
    message = Answers((Answer(0, len(one)), Answer(1, len(two))))
    return b"".join(map(bytes, pack_with_body(Kind.REPLY, message, [one, two], draw(st.integers(1, BATCHES)))))


FAILURES = st.builds(
    Failure,
    st.sampled_from(["own", "collective", "device", "memory", "refused", "cancelled", "?"]),
    st.sampled_from(["ValueError", "KeyError", ""]),
    st.text(max_size=5),
    st.sampled_from(["a.py:1", "b.py:2"]),
    st.just("Traceback"),
    st.integers(-1, RANKS),
    st.lists(st.integers(-1, RANKS), max_size=3).map(tuple),
    st.sampled_from([0, 418, -5, 99999]),
    st.integers(0, 2),
)
LIES = st.one_of(
    answering(),
    right_answers(),
    st.builds(lambda failure, seq: pack(Kind.ERROR, failure, seq), FAILURES, SEQS),
    st.builds(lambda seq: pack(Kind.DONE, Answers(()), seq), SEQS),
    FRAMES,
)


@pytest.mark.parametrize("reply_after_all", [False, True])
@given(lies=st.lists(LIES, max_size=8), rank=st.integers(0, RANKS - 1))
def test_a_lying_rank_answers_no_request_but_its_own_batch(reply_after_all: bool, lies: list[bytes], rank: int) -> None:
    lie(lies, rank, reply_after_all=reply_after_all)


@pytest.mark.parametrize("reply_after_all", [False, True])
@given(st.lists(st.tuples(st.integers(0, RANKS - 1), LIES), max_size=8))
def test_lies_of_several_ranks_change_no_other_batch(reply_after_all: bool, lies: list[tuple[int, bytes]]) -> None:
    group = LyingGroup(reply_after_all=reply_after_all)
    for rank, stream in lies:
        if not group.broken:
            group.receive(rank, read([stream])[0])
    group.end()


@given(st.sampled_from(sorted(seeds())), MUTATIONS, st.integers(0, RANKS - 1))
def test_good_streams_that_are_damaged_a_little(stream: bytes, mutations: list[Mutation], rank: int) -> None:
    lie([mutate(stream, mutations)], rank)


def test_the_check_itself_sees_an_answer_by_a_rank_that_may_not_answer() -> None:
    """The oracle can fail: here it watches a broadcast that takes rank 1 for rank 0."""
    group = LyingGroup()
    group.links[1].rank = 0
    frames, _ = read([next(seeds())])
    with pytest.raises(AssertionError, match="rank 1 has answered"):
        group.receive(1, frames)


def test_the_check_itself_sees_an_answer_to_another_batch() -> None:
    group = LyingGroup()
    frames, _ = read([next(seeds())])
    group.batches[1], group.batches[2] = group.batches[2], group.batches[1]
    with pytest.raises(AssertionError, match="has changed"):
        group.receive(0, [Frame(frame.kind, 0, frame.seq, frame.meta, frame.body) for frame in frames])
