"""What must hold whatever bytes come from a rank. Used by hypothesis (tests/unit/wire/test_fuzz.py) and atheris (`fuzz`)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator, Sequence
from unittest import mock

from minserve.dispatch.request import Request
from minserve.errors import MinServeError, WireError
from minserve.wire import frames as framing
from minserve.wire.frames import FROM_RANK, Frame, FrameReader, Kind, encode
from minserve.wire.messages import (
    Answer,
    Answers,
    Batch,
    Failure,
    Hello,
    Load,
    Loaded,
    Message,
    Part,
    Progress,
    RequestMeta,
    Shutdown,
    Step,
    pack,
    pack_with_body,
    unpack,
)
from minserve.worker.blame import Cause
from minserve.worker.broadcast import Broadcast
from minserve.worker.outstanding import Limits
from tests.fakes import FakeClock, MemoryLink

MESSAGES: tuple[type[Message], ...] = (Hello, Progress, Loaded, Failure, Answers, Load, Batch, Step, Shutdown)
MAX_META, MAX_BODY = 2**12, 2**16
SMALL_SCRATCH = 64
RANKS = 3
BATCHES = 3
REQUESTS = 2  # in each batch


def read(pieces: Iterable[bytes], scratch: int = SMALL_SCRATCH) -> tuple[list[Frame], str]:
    """The frames in a stream that comes in pieces, up to its first error, and that error, "" without one.

    Args:
        scratch: the reader's buffer for small frames; with a small one, frames of a few bytes go the way of large ones.

    Raises:
        AssertionError: the reader has set aside more memory than its limits allow.
    """
    frames: list[Frame] = []
    with mock.patch.object(framing, "SCRATCH_BYTES", scratch):
        reader = FrameReader(MAX_BODY, FROM_RANK, MAX_META)
        try:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    buffer = reader.buffer()
                    assert 0 < len(buffer) <= max(scratch, MAX_META, MAX_BODY)
                    count = min(len(buffer), len(rest))
                    buffer[:count] = rest[:count]
                    rest = rest[count:]
                    frames.extend(reader.received(count))
        except WireError as error:
            return frames, str(error)
    for frame in frames:
        assert len(frame.meta) <= MAX_META
        assert len(frame.body) <= MAX_BODY
    return frames, ""


def unpack_all(meta: bytes) -> None:
    """Any bytes are a message of a kind, or a WireError."""
    for kind in MESSAGES:
        try:
            message = unpack(kind, meta)
        except WireError:
            continue
        assert type(message) is kind


class LyingGroup:
    """A worker with batches under way, one of whose ranks sends whatever it likes."""

    def __init__(self, *, reply_after_all: bool = False) -> None:
        self.links = [MemoryLink(rank) for rank in range(RANKS)]
        self.broken: list[Cause] = []
        limits = Limits(BATCHES, 10.0, 10.0, 1.0, reply_after_all)
        self.broadcast = Broadcast(
            *(FakeClock(), self.links, limits, "m/0", lambda rank, seq: 1),
            *(lambda: None, lambda cause, seq: self.broken.append(cause), _fail, lambda kind, detail, rank, pid: None),
        )
        loop = asyncio.new_event_loop()
        self.batches: dict[int, list[Request]] = {}
        for seq in range(1, BATCHES + 1):
            self.batches[seq] = [
                Request(
                    RequestMeta(f"{seq}.{index}", (), (Part("body", "", 1),)), [b"x"], math.inf, loop.create_future()
                )
                for index in range(REQUESTS)
            ]
            self.broadcast.send(self.batches[seq])
        loop.close()

    def receive(self, rank: int, frames: Iterable[Frame]) -> None:
        """Hands frames over as a link does: the first one that is refused is the last.

        Raises:
            AssertionError: a request was answered by a frame that was not about it, or not from rank 0.
        """
        for frame in frames:
            if frame.kind not in (Kind.REPLY, Kind.CHUNK, Kind.ERROR, Kind.DONE):
                continue  # these never reach the broadcast
            before = self._state()
            try:
                self.broadcast.received(self.links[rank], frame)
            except WireError:
                assert self._state() == before, f"{frame} was refused and yet has changed a request"
                return
            if self.broken:
                return
            self._check(rank, frame, before)
        self.broadcast.taken()

    def _check(self, rank: int, frame: Frame, before: dict[str, tuple[bool, int]]) -> None:
        after = self._state()
        changed = {name for name in after if after[name] != before[name]}
        own = {request.meta.id for request in self.batches.get(frame.seq, [])}
        assert changed <= own, f"{frame} has changed {changed - own}"
        for request in self.batches.get(frame.seq, []):
            if request.meta.id in changed and request.reply.done() and request.reply.exception() is None:
                assert rank == 0, f"rank {rank} has answered {request.meta.id}"
                if request.stream is None:
                    assert bytes(request.reply.result().body) in bytes(frame.body)

    def _state(self) -> dict[str, tuple[bool, int]]:
        """For each request whether it is answered, and how many chunks it has."""
        return {
            request.meta.id: (request.reply.done(), _chunks(request))
            for requests in self.batches.values()
            for request in requests
        }

    def end(self) -> None:
        """The worker fails: every request that is not answered by then is, and none twice."""
        self.broadcast.fail_rest(MinServeError("the worker has failed"), begun=1)
        for requests in self.batches.values():
            for request in requests:
                assert request.reply.done(), f"{request.meta.id} was never answered"
                request.reply.exception()  # asked for, so that nothing is said about it later


def _fail(requests: list[Request], error: MinServeError, begun: bool) -> None:
    for request in requests:
        request.fail(error)


def _chunks(request: Request) -> int:
    return 0 if request.stream is None else len(request.stream._chunks)


def lie(stream: Sequence[bytes], rank: int, *, reply_after_all: bool = False) -> None:
    """Everything from a rank's bytes to its victims' answers, in one."""
    frames, _ = read(stream)
    for frame in frames:
        unpack_all(bytes(frame.meta))
    group = LyingGroup(reply_after_all=reply_after_all)
    group.receive(rank, frames)
    group.end()


def seeds() -> Iterator[bytes]:
    """Good streams, for a fuzzer to start from."""
    both = Answers((Answer(0, 1), Answer(1, 2)), 1)
    failure = Failure("own", "ValueError", "no", "handler.py:3", "Traceback", 0, (0, 1, 2), 0, 1)
    reply = [b"".join(map(bytes, pack_with_body(Kind.REPLY, both, [b"A", b"BB"], seq))) for seq in (1, 2, 3)]
    chunk = b"".join(map(bytes, pack_with_body(Kind.CHUNK, Answers((Answer(1, 2),), 1), [b"cc"], 1)))
    yield from reply
    yield b"".join(reply)
    yield chunk + chunk + reply[0]
    yield pack(Kind.ERROR, failure, 1) + reply[1]
    yield pack(Kind.DONE, Answers(()), 1) + encode(Kind.DONE, 2)
    yield pack(Kind.PROGRESS, Progress("weights", 1, 2)) + pack(Kind.LOADED, Loaded(1.0, True))
    yield pack(Kind.HELLO, Hello(1, 1, 2, 4711, "m-0-abc", "secret"))
