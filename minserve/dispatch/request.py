"""The nouns of a request's life, the same whatever protocol it came by."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from minserve.wire.arena import Segment
    from minserve.wire.messages import Answer, Buffer, RequestMeta


CHUNK_OVERHEAD = 100  # bytes that a chunk takes beside its own: of small ones most of what they take


class Stream:
    """The chunks of one streaming answer on their way from rank 0 to the client.

    Args:
        room: bytes that may wait, with `CHUNK_OVERHEAD` for each chunk, before the ranks are to pause.
        on_change: called when it has room again, and when the client has left.
    """

    __slots__ = ("_chunks", "_ended", "_error", "_on_change", "_room", "_waiter", "_waiting", "muted")

    def __init__(self, room: int, on_change: Callable[[], None]) -> None:
        self._room = room
        self._on_change = on_change
        self._chunks: deque[Buffer] = deque()
        self._waiting = 0  # bytes of them, with what they take beside
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._error: Exception | None = None
        self.muted = False  # the client has left: what still comes is dropped

    @property
    def waiting(self) -> int:
        """Bytes that wait for the client, with `CHUNK_OVERHEAD` for each chunk."""
        return self._waiting

    @property
    def has_room(self) -> bool:
        """Whether the client keeps up."""
        return self._waiting < self._room

    @property
    def over(self) -> bool:
        """Whether nothing more is wanted of it: it has ended, or the client has left."""
        return self.muted or self._ended

    def put(self, chunk: Buffer) -> None:
        """One more chunk. One of nothing behind others is nothing to anybody; without them it lets the answer's head go."""
        if not self.muted and not self._ended and (len(chunk) or not self._chunks):
            self._chunks.append(chunk)
            self._waiting += len(chunk) + CHUNK_OVERHEAD
            self._wake()

    def end(self, error: Exception | None = None) -> None:
        """No more chunks will come; with an error, the answer is not whole."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._wake()

    def mute(self) -> None:
        """The client has left, or has got all of it."""
        if not self.muted:
            self.muted = True
            self._chunks.clear()
            self._waiting = 0
            if not self._ended:
                self._on_change()

    async def take(self, most: int) -> list[Buffer]:
        """The next chunk and those that have come behind it, while all of them stay under so many bytes; none at the end.

        Raises:
            MinServeError: the stream broke off.
        """
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._ended:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.take_ready(most)

    def take_ready(self, most: int) -> list[Buffer]:
        """What `take` gives without waiting; none where none has come."""
        chunks = self._chunks
        if not chunks:
            return []
        taken = [chunks.popleft()]
        size = len(taken[0])
        while chunks and size + len(chunks[0]) < most:
            taken.append(chunks.popleft())
            size += len(taken[-1])
        had_room = self.has_room
        self._waiting -= size + CHUNK_OVERHEAD * len(taken)
        if self.has_room and not had_room:
            self._on_change()
        return taken

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(slots=True)
class Reply:
    """What the client gets. With a `stream` the body is its first chunks and `body` is empty."""

    status: int
    reason: str
    headers: Sequence[tuple[str, str]]
    body: Buffer
    stream: Stream | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One client's request: `meta` and `bodies` as every rank gets them, and where its answer goes.

    `deadline` is a time on the dispatcher's clock. `reply` is set exactly once. `worker` is empty while it waits. `attempts`
    counts the workers that failed with it in flight. `named` says that the client has named the version. `entered` and
    `sent` are on the clock of its meters: when it was admitted, and when it went into a batch. `segments` are those bodies,
    by index, that lie in an arena: whoever submits the request holds them until it is answered.
    """

    meta: RequestMeta
    bodies: Sequence[Buffer]
    deadline: float
    reply: asyncio.Future[Reply]
    arrived: float = 0.0
    worker: str = ""
    attempts: int = 0
    stream: Stream | None = field(default=None)
    named: bool = False
    entered: float = 0.0
    sent: float = 0.0
    segments: Mapping[int, Segment] | None = None

    def answer(self, answer: Answer, body: Buffer) -> bool:
        """Rank 0's whole answer, or the end of its stream. Dropped, and False, when nobody waits for it any more."""
        if self.stream is not None:
            wanted = not self.stream.over
            if len(body):
                self.stream.put(body)
            self.stream.end()
            return wanted
        if self.reply.done():
            return False
        self.reply.set_result(Reply(answer.status, answer.reason, answer.headers, body))
        return True

    @property
    def left(self) -> bool:
        """Whether nobody waits for what is still to come: the client has gone, or has had its answer."""
        return self.reply.done() if self.stream is None else self.stream.over

    def chunk(self, answer: Answer, body: Buffer, room: int, on_change: Callable[[], None]) -> None:
        """One chunk of a stream. The first one is the answer to the deadline; from then on responseTimeout watches.

        Args:
            room, on_change: of the stream, see `Stream`.
        """
        if self.stream is None:
            self.stream = Stream(room, on_change)
            self.deadline = math.inf
            if self.reply.done():
                self.stream.muted = True
            else:  # with its chunk in it: whoever is told may take that at once
                self.stream.put(body)
                self.reply.set_result(Reply(answer.status, answer.reason, answer.headers, b"", self.stream))
            return
        self.stream.put(body)

    def fail(self, error: Exception) -> None:
        """The answer is an error."""
        if self.stream is not None:
            self.stream.end(error)
        elif not self.reply.done():
            self.reply.set_exception(error)
