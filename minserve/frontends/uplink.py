"""A frontend process's end of its channel: what it asks the server, and where the answers go."""

from __future__ import annotations

import asyncio
import itertools
from time import perf_counter
from typing import TYPE_CHECKING

from minserve.dispatch.request import Reply, Stream
from minserve.frontends.messages import Allowed, Answered, Ask, Piece, Refused, Submit, Taken, ToldError
from minserve.frontends.relay import AHEAD
from minserve.wire.frames import Kind
from minserve.wire.messages import split_body, unpack

if TYPE_CHECKING:
    from minserve.dispatch.request import Request
    from minserve.frontends.channel import Channel
    from minserve.wire.frames import Frame
    from minserve.wire.messages import Buffer


class Uplink:
    """Requests and questions under way, by their numbers.

    Attributes:
        channel: to the server.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._loop = asyncio.get_running_loop()
        self._next = itertools.count(1)
        self._asked: dict[int, asyncio.Future[float]] = {}
        self._waiting: dict[int, Request] = {}
        self._numbers: dict[Request, int] = {}  # of those that wait
        self._streams: dict[int, RelayedStream] = {}

    # ── out ──

    async def ask(self, model: str | None, version: str, authorization: str) -> float:
        """Asks whether a client may send a request. Returns how many seconds it has then.

        Raises:
            ToldError: it may not.
        """
        number = next(self._next)
        asked: asyncio.Future[float] = self._loop.create_future()
        self._asked[number] = asked
        self.channel.send(Kind.ASK, number, Ask(model, version, authorization))
        try:
            return await asked
        finally:
            del self._asked[number]

    async def submit(self, model: str | None, version: str, request: Request) -> Reply:
        """Sends a request and waits for its answer. Cancelling the call takes it out of the queue.

        Raises:
            ToldError: it was refused, expired, or failed with its worker.
        """
        self.begin(model, version, request)
        try:
            return await request.reply
        except asyncio.CancelledError:  # perhaps with the answer already there, and nobody to take it
            self.withdraw(request)
            raise

    def begin(self, model: str | None, version: str, request: Request) -> None:
        """Sends a request, whose `reply` then tells the answer."""
        number = self._numbers[request] = next(self._next)
        self._waiting[number] = request
        began = request.arrived or self._loop.time()
        asked = Submit(model, version, began, request.deadline, request.meta)
        self.channel.send_with_body(Kind.SUBMIT, number, asked, request.bodies)
        request.bodies = ()  # the server has them
        request.entered = perf_counter()

    def withdraw(self, request: Request) -> None:
        """The client has left."""
        number = self._numbers.pop(request, None)
        if number is not None:
            del self._waiting[number]
            self.channel.send(Kind.LEAVE, number)
        elif request.stream is not None:
            request.stream.mute()

    # ── in ──

    def received(self, frame: Frame) -> None:
        """Takes a frame about a request, or about a question.

        Raises:
            WireError: it is not what it says.
        """
        number = frame.seq
        match frame.kind:
            case Kind.ANSWER if number in self._waiting:
                request = self._pop(number)
                answered = unpack(Answered, frame.meta)
                if not request.reply.done():
                    request.reply.set_result(Reply(answered.status, answered.reason, answered.headers, frame.body))
            case Kind.STREAM if number in self._waiting:
                self._begin_stream(number, unpack(Answered, frame.meta), frame.body)
            case Kind.PIECE if number in self._streams:
                for chunk in split_body(frame.body, unpack(Piece, frame.meta).lengths):
                    self._streams[number].put(chunk)
            case Kind.END if number in self._streams:
                self._streams.pop(number).end()
            case Kind.REFUSED:
                self._refused(number, ToldError(unpack(Refused, frame.meta)))
            case Kind.ALLOWED:
                asked = self._asked.get(number)
                if asked is not None and not asked.done():
                    asked.set_result(unpack(Allowed, frame.meta).request_timeout)

    def _begin_stream(self, number: int, head: Answered, body: bytearray) -> None:
        chunks = split_body(body, head.lengths)
        request = self._pop(number)
        stream = RelayedStream(number, self, head.stall_timeout)
        if request.reply.done():
            stream.mute()
            return
        self._streams[number] = request.stream = stream
        for chunk in chunks:
            stream.put(chunk)
        request.reply.set_result(Reply(head.status, head.reason, head.headers, b"", stream))

    def _refused(self, number: int, error: ToldError) -> None:
        if number in self._waiting:
            self._pop(number).fail(error)
        elif number in self._streams:
            self._streams.pop(number).end(error)
        elif number in self._asked and not self._asked[number].done():
            self._asked[number].set_exception(error)

    def _pop(self, number: int) -> Request:
        """A request that has its answer, or the head of it."""
        request = self._waiting.pop(number)
        del self._numbers[request]
        return request

    def leave_stream(self, number: int) -> None:
        """The client of a stream has left."""
        self._streams.pop(number, None)
        self.channel.send(Kind.LEAVE, number)


class RelayedStream(Stream):
    """A stream that comes from the server, which is told how much of it its client has taken.

    Attributes:
        stall_timeout: seconds for which the client may take no byte.
    """

    __slots__ = ("_number", "_taken", "_uplink", "stall_timeout")

    def __init__(self, number: int, uplink: Uplink, stall_timeout: float) -> None:
        super().__init__(2 * AHEAD, self._changed)  # nobody looks: the server sends no more than AHEAD and a chunk
        self._number = number
        self._uplink = uplink
        self._taken = 0
        self.stall_timeout = stall_timeout

    def take_ready(self, most: int) -> list[Buffer]:
        """See `Stream.take_ready`."""
        chunks = super().take_ready(most)
        self._taken += sum(map(len, chunks))
        if self._taken >= AHEAD // 2:  # not with each chunk: the server need not hear of every token
            self._uplink.channel.send(Kind.TAKEN, self._number, Taken(self._taken))
            self._taken = 0
        return chunks

    def _changed(self) -> None:
        if self.muted:
            self._uplink.leave_stream(self._number)
