"""Large bodies between the server and its ranks: what is lent, looked at and given back on both sides."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.dispatch.request import Request
from minserve.errors import BadRequest, WireError, WorkerFailed
from minserve.rank.bodies import Bodies
from minserve.rank.connection import Connection, Disconnected
from minserve.rank.memory import Replies, open_memory
from minserve.wire.arena import BLOCK_BYTES, SHARE_FROM, Arena, new_memory
from minserve.wire.frames import MAX_META_BYTES, Frame, Kind, encode
from minserve.wire.messages import Answer, Answers, Batch, Part, RequestMeta, Shared, pack_with_body, unpack
from minserve.wire.views import Views
from minserve.worker import streams
from minserve.worker.memory import Memory, give, new_arena
from tests.unit.worker.broadcasts import Group, body_of, failure, frame_of
from tests.unit.worker.specs import make_spec, model_config

BODY = bytes(range(256)) * (SHARE_FROM // 256)
BLOCKS = 8


class Worker:
    """One life of a worker: a broadcast, and what each of its two ranks has of the shared memory."""

    def __init__(self, arena: Arena) -> None:
        self.memory = Memory(arena, 2)
        self.views: list[Views] = []
        replies: list[Replies | None] = []
        for rank in range(2):
            views, reply = open_memory([os.dup(one) for one in self.memory.descriptors(rank)], rank, 2)
            assert views is not None
            self.views.append(views)
            replies.append(reply)
        assert replies[0] is not None
        assert replies[1] is None, "only rank 0 answers"
        self.replies = replies[0]
        self.memory.close_descriptors()
        self.group = Group(memory=self.memory)

    def rows(self, rank: int, *, views: bool = False) -> list[dict[str, object]]:
        """What the handler of a rank gets of the last batch."""
        frame = self.group.links[rank].frames[-1]
        return Bodies(self.views[rank], views=views).decode(unpack(Batch, frame.meta), frame.body)

    def reply(self, seq: int, *bodies: bytes, kind: Kind = Kind.REPLY, step: int = 0) -> Answers:
        frame = self.frame(seq, *bodies, kind=kind, step=step)
        self.group.receive(0, frame)
        return unpack(Answers, frame.meta)

    def frame(self, seq: int, *bodies: bytes, kind: Kind, step: int) -> Frame:
        """What rank 0 sends of its answers."""
        shared, rest = self.replies.place(bodies)
        answers = Answers(tuple(Answer(index, len(body)) for index, body in enumerate(bodies)), step, shared=shared)
        return frame_of(pack_with_body(kind, answers, rest, seq))


@pytest.fixture
def arena() -> Arena:
    return Arena(new_memory("test", BLOCKS * BLOCK_BYTES))


@pytest.fixture(autouse=True)
def no_memory_is_left(arena: Arena) -> Iterator[None]:
    """Every descriptor and mapping of a worker's shared memory goes with the worker."""
    gc.collect()
    before = held()
    yield
    gc.collect()
    assert held() <= before


def held() -> int:
    """Mappings and descriptors of a server's shared memory in this process."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    links = [os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
    return sum("memfd:minserve-" in one for one in [*maps, *links])


def request(arena: Arena, *bodies: bytes) -> Request:
    """With every large body in the arena."""
    meta = RequestMeta("id", (), tuple(Part(f"p{index}", "", len(body)) for index, body in enumerate(bodies)))
    segments, views = {}, list[bytes | memoryview](bodies)
    for index, body in enumerate(bodies):
        if len(body) >= SHARE_FROM and (segment := arena.allocate(len(body))):
            segment.view[:] = body
            segments[index], views[index] = segment, segment.view
    return Request(meta, views, math.inf, asyncio.get_running_loop().create_future(), segments=segments)


def release(one: Request) -> None:
    """The client has its answer."""
    for segment in (one.segments or {}).values():
        segment.release()


@pytest.mark.asyncio
async def test_every_rank_finds_a_large_body_in_the_arena_and_the_small_ones_in_its_frame(arena: Arena) -> None:
    worker = Worker(arena)
    one, two = request(arena, b"small", BODY, b""), request(arena, BODY[::-1])
    worker.group.broadcast.send([one, two])
    for rank in range(2):
        assert worker.group.links[rank].frames[-1].body == b"small"
        assert worker.rows(rank) == [{"p0": b"small", "p1": BODY, "p2": b""}, {"p0": BODY[::-1]}]
    assert arena.used, "the requests are not answered yet"
    release(one)
    release(two)
    assert arena.used == 0


@pytest.mark.asyncio
async def test_a_request_whose_worker_fails_goes_to_the_next_from_the_same_segment(arena: Arena) -> None:
    first, second = Worker(arena), Worker(arena)
    one = request(arena, BODY)
    first.group.broadcast.send([one])
    looked_at = first.rows(0, views=True)
    first.group.broadcast.fail_all(WorkerFailed("dead"), 1)
    second.group.broadcast.send([one])
    assert second.rows(0) == second.rows(1) == [{"p0": BODY}]
    release(one)
    assert arena.used, "the first worker's ranks may still look at it"
    first.memory.close()
    assert arena.used == 0
    assert looked_at == [{"p0": BODY}]


@pytest.mark.asyncio
async def test_ranks_that_died_with_segments_hold_none(arena: Arena) -> None:
    worker = Worker(arena)
    one = request(arena, BODY)
    worker.group.broadcast.send([one])
    release(one)
    assert arena.used
    worker.memory.close()
    assert arena.used == 0


@pytest.mark.asyncio
async def test_a_batch_that_cannot_be_sent_is_lent_to_nobody(arena: Arena) -> None:
    worker = Worker(arena)
    one = request(arena, BODY)
    one.meta.url_path = "x" * (MAX_META_BYTES + 1)
    with pytest.raises(BadRequest):
        worker.group.broadcast.send([one])
    release(one)
    assert arena.used == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("shares", [False, True])
async def test_a_body_in_an_arena_that_the_ranks_do_not_have_is_copied_into_the_frame(
    arena: Arena, shares: bool
) -> None:
    group = Worker(Arena(new_memory("test", BLOCK_BYTES))).group if shares else Group()
    one = request(arena, BODY)
    group.broadcast.send([one])
    release(one)
    assert arena.used == 0
    other = request(arena, b"y" * SHARE_FROM)  # in its place
    frame = group.links[1].frames[-1]
    assert Bodies().decode(unpack(Batch, frame.meta), frame.body) == [{"p0": BODY}]
    release(other)


@pytest.mark.asyncio
async def test_a_large_answer_is_looked_at_until_its_client_has_it(arena: Arena) -> None:
    worker = Worker(arena)
    small, large = request(arena, b"a"), request(arena, b"b")
    worker.group.broadcast.send([small, large])
    answers = worker.reply(1, b"A", BODY)
    assert [place.index for place in answers.shared] == [1]
    assert (body_of(small), body_of(large)) == (b"A", BODY)
    assert worker.memory.held == len(BODY)
    del large
    assert worker.memory.held == 0


@pytest.mark.asyncio
async def test_answers_that_clients_are_slow_to_take_are_not_overwritten(arena: Arena) -> None:
    worker = Worker(arena)
    clients = []
    for number in range(BLOCKS + 2):
        clients.append(request(arena, b"a"))
        worker.group.broadcast.send(clients[-1:])
        answers = worker.reply(number + 1, bytes([number]) * SHARE_FROM)
        assert bool(answers.shared) == (number < BLOCKS), "the last ones go inline: there is no room"
    assert [body_of(client)[:1] for client in clients] == [bytes([number]) for number in range(BLOCKS + 2)]


@pytest.mark.asyncio
async def test_an_answer_that_nobody_waits_for_is_given_back(arena: Arena) -> None:
    worker = Worker(arena)
    for seq in range(1, 2 * BLOCKS):
        one = request(arena, b"a")
        worker.group.broadcast.send([one])
        one.reply.cancel()
        assert worker.reply(seq, BODY).shared, "there is room again"
    assert worker.memory.held == 0


@pytest.mark.asyncio
async def test_a_chunk_behind_a_failure_is_for_nobody_and_given_back(arena: Arena) -> None:
    worker = Worker(arena)
    worker.group.broadcast.send([request(arena, b"a")])
    worker.reply(1, BODY, kind=Kind.CHUNK, step=1)
    assert worker.memory.held == len(BODY)
    worker.group.error(1, 1, failure())
    before = worker.memory.held
    worker.reply(1, BODY, kind=Kind.CHUNK, step=2)
    assert worker.memory.held == before


@pytest.mark.asyncio
@pytest.mark.parametrize(("large", "steps"), [(None, 4), (0, 4), (2, 2), (3, 1)], ids=str)
async def test_large_chunks_do_not_count_as_quick_steps(arena: Arena, large: int | None, steps: int) -> None:
    """All that is granted may come to wait for a slow client."""
    worker = Worker(arena)
    worker.group = Group(stream_ahead=None, memory=worker.memory)
    one = request(arena, b"a")
    worker.group.broadcast.send([one])
    chunks = [BODY if number == large else b"c" for number in range(4)]
    frames = [worker.frame(1, chunk, kind=Kind.CHUNK, step=step) for step, chunk in enumerate(chunks, 1)]
    worker.group.receive_together(0, *frames)
    assert one.stream is not None
    assert await one.stream.take(2 * len(BODY)) == chunks
    one.stream.mute()
    assert worker.group.told(Kind.GRANT) == [4 + steps * streams.AHEAD]


@pytest.mark.asyncio
@pytest.mark.parametrize("place", [Shared(1, 0, 1), Shared(0, BLOCKS, 1)])
async def test_an_answer_that_is_not_where_it_is_said_to_be_is_an_error(arena: Arena, place: Shared) -> None:
    for group in (Worker(arena).group, Group()):
        group.broadcast.send([request(arena, b"a")])
        frame = frame_of(pack_with_body(Kind.REPLY, Answers((Answer(0, 5),), shared=(place,)), [], 1))
        with pytest.raises(WireError):
            group.receive(0, frame)


def test_descriptors_come_with_the_answer_to_hello(arena: Arena) -> None:
    memory = Memory(arena, 2)
    for rank, count in [(0, 4), (1, 2)]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            give(memory, ours, rank)
            ours.send(encode(Kind.SHUTDOWN))
            connection = Connection(theirs)
            descriptors = connection.receive_memory()
            assert len(descriptors) == count
            assert not any(map(os.get_inheritable, descriptors)), "a handler's own children have no use for them"
            assert connection.receive().kind is Kind.SHUTDOWN
            for one in descriptors:
                os.close(one)
    memory.close()


def test_the_end_of_a_worker_needs_no_garbage_collection(arena: Arena) -> None:
    """A group of ranks is a web of objects that know each other; the collector may come to it hours later."""
    before = held()
    memory = Memory(arena, 2)
    segment = arena.allocate(SHARE_FROM)
    assert segment is not None
    memory.lend([segment])
    assert memory.answers is not None
    answer = memory.answers.view(0, 1, SHARE_FROM)
    memory.close()
    assert held() == before + 3, "mappings of the answers and of their marks, which has a descriptor"
    assert bytes(answer[:2]) == b"\0\0"
    del answer
    assert held() == before
    segment.release()
    assert arena.used == 0


def test_without_shared_memory_the_answer_to_hello_brings_none() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        give(None, ours, 0)
        assert Connection(theirs).receive_memory() == []
        ours.send(encode(Kind.SHUTDOWN))
        with pytest.raises(WireError, match="answers HELLO with SHUTDOWN"):
            Connection(theirs).receive_memory()
        ours.close()
        with pytest.raises(Disconnected):
            Connection(theirs).receive_memory()
    assert open_memory([], 0, 2) == (None, None)


@pytest.mark.parametrize(("options", "blocks"), [({}, 4096), ({"shared_memory": 3 * BLOCK_BYTES + 1}, 3)])
def test_an_arena_is_as_large_as_the_model_says(options: dict[str, object], blocks: int) -> None:
    arena = new_arena(make_spec(config=model_config("", options)))
    assert arena is not None
    assert arena.blocks == blocks


@pytest.mark.parametrize("options", [{"shared_memory": 0}, {"shared_memory": 9}, {"socket_type": "tcp"}])
def test_there_is_none_where_it_is_not_wanted_or_cannot_be_handed_over(options: dict[str, object]) -> None:
    assert new_arena(make_spec(config=model_config("", options))) is None
