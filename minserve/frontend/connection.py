"""One client's connection: what it may take its time over, and what happens when it sends no HTTP.

aiohttp parses and keeps the order of requests and answers. Added here, by overriding its request handler:

- one look at every connection a second, in place of timers, finds heads that do not end, idle connections and clients that
  do not read. A limit is therefore kept to a second or two;
- errors of the protocol are answered in our JSON, and the connection ends with the answer;
- a client that has ended its own direction gets its answer; one that has gone is told apart from it;
- a stream hands over bytes only as its client takes them.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from aiohttp import HttpVersion11, web
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import _ErrInfo

from minserve.errors import BadRequest, Draining, MinServeError
from minserve.frontend.body import give_up_body
from minserve.frontend.errors import error_response, from_parser, refusal
from minserve.frontend.half_closed import abort_if_gone, probe
from minserve.frontend.headers import REQUEST_ID, request_id
from minserve.frontend.heads import MAX_HEAD, head_too_large, wrong_with
from minserve.frontend.intake import WORTH, Intake
from minserve.frontend.lane import LaneHandler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from minserve.frontend.connections import Connections
    from minserve.frontend.passage import Carrier

logger = logging.getLogger(__name__)

# Bytes that may come around the chunks of a body; what the parser has not looked at yet is among them.
MAX_OVERHEAD = 2**19
PIPELINED = 4  # requests that may wait behind the one at work before no more is read: their bodies are counted nowhere
STREAM_AHEAD = 16384  # bytes of a stream that may wait in this process for the client's socket to take them


class Connection(LaneHandler):
    """One client's connection."""

    __slots__ = (
        *("_body", "_ending", "_half_closed", "_head_size", "_options"),
        *("_overhead", "_read_timeout", "_seen", "_seen_at"),
    )

    _manager: Connections | None

    def __init__(self, manager: Connections, express: Carrier | None, **options: object) -> None:
        super().__init__(manager, express, **options)
        self._max_msg_queue_size, self._msg_queue_resume_size = PIPELINED, PIPELINED // 2
        self._options = manager.options
        self._read_timeout = manager.options.body_timeout  # for the client to take some bytes of its answer
        self._body: StreamReader = EMPTY_PAYLOAD  # the last request's, which may still be arriving
        self._head_size = 0  # bytes of a head that is not whole yet
        self._overhead = 0  # bytes that have come of a body, with all that is around its chunks
        self._ending = False  # an answer that ends the connection is under way: what comes now is not looked at
        self._half_closed = False
        self._seen: tuple[str, int] | None = None  # what it was seen waiting for, and since when
        self._seen_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        assert self._manager is not None
        if self._manager.full:
            self._manager.refuse(cast("asyncio.Transport", transport))
        else:
            super().connection_made(transport)

    # ── bytes that are no request ──

    def data_received(self, data: bytes) -> None:
        """Bytes from the client. Called with none when reading goes on."""
        if self._ending:
            return
        if data and not (data := self.past(data)):
            self._body = EMPTY_PAYLOAD  # an earlier request's, of which `_ended_at_work` would take notice
            return
        self.parse(data)

    def parse(self, data: bytes) -> None:
        """Bytes for the parser."""
        between = self._body.is_eof()  # nothing is left to come of an earlier request
        self.feed(data)
        if self._messages:
            message, body = self._messages[-1]
            if isinstance(message, _ErrInfo):
                self._malformed()
            else:
                self._body = body
                size = self._head_size + len(data)
                if size > MAX_HEAD or len(self._messages) > 1 or message.version is not HttpVersion11:
                    self._check_heads()
            self._head_size = self._overhead = 0
            self.go_on(data)
        elif between:
            # These bytes have not made a request. Empty lines, which some clients send behind a body, begin none.
            if self._head_size or data.strip(b"\r\n"):
                self._head_size += len(data)
            if self._head_size > MAX_HEAD:
                self._refuse(head_too_large())
        elif not self._body.is_eof():
            self._overhead += len(data)
            if self._overhead > MAX_OVERHEAD + 8 * self._body.total_bytes:  # chunks of one byte take six
                self._ending = True
                what = f"{self._body.total_bytes} bytes of the body came in more than {self._overhead} bytes of chunks"
                self._loop.call_soon(self._break_off, BadRequest(f"bad request: {what}"))

    def _check_heads(self) -> None:
        """Refuses what the parser lets pass. Ordinary requests are not looked at."""
        for place, (message, _) in enumerate(self._messages):
            assert not isinstance(message, _ErrInfo)  # nothing is looked at behind one
            error = wrong_with(message)
            if error is not None:
                while len(self._messages) > place:
                    self._messages.pop()
                self._body = EMPTY_PAYLOAD
                self._refuse(error)
                return

    def _malformed(self) -> None:
        """The parser has given up. Its complaint waits behind the requests before it, or is about the last one's body."""
        self._ending = True
        if len(self._messages) > 1:
            if not self._messages[-2][1].is_eof():
                del self._messages[-2]
        elif not self._body.is_eof():
            complaint = cast("_ErrInfo", self._messages.pop()[0])
            self._loop.call_soon(self._break_off, from_parser(complaint.exc))

    def _break_off(self, error: MinServeError) -> None:
        """No more comes of the body of the request at work.

        Called a little late: aiohttp may just have taken up that request, and only then shows it.
        """
        if self._current_request is not None:
            give_up_body(self._current_request, error)
        elif not self._body.is_eof():  # it is answered, what comes of its body is thrown away
            self.close()
            self._body.feed_eof()

    def _refuse(self, error: MinServeError) -> None:
        """Answers a client whose head is not there, by the way that the parser's complaints go."""
        self._ending = True
        self._messages.append((_complaint(error), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no HTTP, or to an exception outside a route's handler. The connection ends with it."""
        error = from_parser(exc)
        if type(error) is MinServeError:
            logger.error("%s %s: unforeseen", request.method, request.raw_path, exc_info=exc)
        else:  # whoever likes can make these as fast as the network carries them
            logger.debug("%s: refused with %d: %s", request.remote, error.status, error)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun, and another cannot follow in its place")
        if self._manager is not None:
            self._manager.answered(error.status)
        response = error_response(error)
        response.headers["Server"] = "minserve"
        response.headers["Connection"] = "close"  # aiohttp answers as to HTTP/1.0, which closes without a word
        response.headers[REQUEST_ID] = request_id(request.headers)
        response.force_close()
        return response

    # ── the end of the server ──

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        """Ends the connection, once a request at work has its answer.

        aiohttp looks at nothing that comes from now on: a body that is not whole would be waited for in vain.
        """
        request = self._current_request
        if request is not None and request.content is self._body and not self._body.is_eof():
            give_up_body(request, Draining("the server is shutting down; the body had not arrived"))
        await super().shutdown(timeout)

    # ── a body past the parser ──

    async def receive(self, content: StreamReader, rest: memoryview) -> None:
        """Takes the rest of the body of the request at work, all that the parser has not had, if that is worth it."""
        if len(rest) >= WORTH and not (self._reading_paused or self._half_closed or content.exception()):
            await Intake(self, content, rest).take()

    def leave_body(self) -> None:
        """Nobody wants the rest of a body that the parser knows nothing of."""
        self._ending = True
        self.close()

    # ── a client that has ended its direction, or has gone ──

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio asks for it, aiohttp only never had an answer
        """The client sends no more: True leaves the connection open for its answers.

        By HTTP/1.0, and once an answer has begun, nothing can be sent to probe it, and it counts as one that leaves: that
        one who has left holds no place in the queue weighs more.
        """
        self.give_early()
        starting = self._waiter is not None
        if starting and not self._messages:
            return False  # nothing to answer
        transport = self.transport
        if transport is None or transport.get_extra_info("sslcontext") is not None:
            return False  # TLS ends in both directions at once
        self._half_closed = True
        if self._messages and not self._messages[-1][1].is_eof():
            self._messages[-1] = (_complaint(_cut_short()), EMPTY_PAYLOAD)
            self._body = EMPTY_PAYLOAD
        if not starting:
            self._loop.call_soon(self._ended_at_work)  # as late as `_break_off`
            return True
        if len(self._messages) == 1:  # else the last answer ends it, see `look`
            self.close()
        first = self._messages[0][0]
        if not isinstance(first, _ErrInfo):
            if first.version < HttpVersion11:
                return False
            probe(transport, self._loop)
        return True

    def _ended_at_work(self) -> None:
        request = self._current_request
        if self.transport is None:
            return
        if self._waiter is not None:  # it has had all its answers meanwhile
            self.force_close()
        elif not self._body.is_eof():
            self._break_off(_cut_short())
        elif self._body.exception() is None:  # else it was broken off already: the loop may tell of one end twice
            if not self._messages:
                self.close()
            if request is not None:
                too_late = request.writer.output_size > 0 or request.version < HttpVersion11
            elif self._carried is not None:
                too_late = self._carried.sent > 0
            else:
                return  # what there is, is an answer on its way out
            if too_late:
                self.transport.abort()
            else:
                probe(self.transport, self._loop)

    # ── a stream ──

    @contextmanager
    def streaming(self, stall_timeout: float) -> Iterator[None]:
        """For the time of a stream: few bytes wait here for its client, which may take none for so many seconds."""
        transport = self.transport
        if transport is not None:
            transport.set_write_buffer_limits(high=STREAM_AHEAD)
        self._read_timeout = stall_timeout
        try:
            yield
        finally:
            self._read_timeout = self._options.body_timeout
            if transport is not None and not transport.is_closing():
                transport.set_write_buffer_limits()

    # ── once a second ──

    def look(self, transport: asyncio.Transport, now: float) -> None:
        """Ends the connection if it has waited for the same thing for too long."""
        waiting_for, limit = self._waits_for(transport)
        if not waiting_for:
            self._seen = None
            if self._half_closed:
                abort_if_gone(transport)
        elif self._seen != waiting_for:
            self._seen, self._seen_at = waiting_for, now
        elif now - self._seen_at >= limit:
            self._give_up(waiting_for[0], transport, limit)

    def _waits_for(self, transport: asyncio.Transport) -> tuple[tuple[str, int] | None, float]:
        """What the server waits for the client to do, with a mark of how far it is, and for how many seconds it may."""
        if transport.is_closing():  # but what it was sent is not taken: without a look at it, it would stay for ever
            return ("reading", -transport.get_write_buffer_size()), self._read_timeout
        if self._waiter is None or self._waiter.done():
            if self._paused:
                written = self._current_request.writer.output_size if self._current_request is not None else 0
                return ("reading", written - transport.get_write_buffer_size()), self._read_timeout
            return None, 0.0  # it is at work; bodies and the dispatcher have their own limits
        if self._half_closed:
            return ("leaving", 0), 0.0
        if self._head_size or not self._request_count:
            return ("head", self._request_count), self._options.header_timeout
        return ("request", self._request_count), self._options.keepalive_timeout

    def _give_up(self, on: str, transport: asyncio.Transport, limit: float) -> None:
        if on == "head" and self._head_size:
            self._refuse(refusal(408, f"the head of the request took longer than header_timeout ({limit:g} s)"))
        elif on == "reading":
            logger.debug("a client has taken nothing of its answer for %g s", limit)
            transport.abort()
        else:
            self.force_close()

    def _process_keepalive(self) -> None:
        """aiohttp's own timer, set once and never again: `look` does its work."""


def _complaint(error: MinServeError) -> _ErrInfo:
    return _ErrInfo(error.status, error, str(error))


def _cut_short() -> MinServeError:
    return BadRequest("the connection ended before the body did")
