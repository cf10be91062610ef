"""A connection on which a request can be carried past aiohttp, which sleeps meanwhile and keeps the order of answers.

aiohttp's own task takes one request after the other from a queue, and waits for a future when there is none. That future is
hidden from whatever would wake it while a passage is under way: what the client sends then waits in the queue, as it does
behind any request that is at work.

What `frontend.express` does not answer itself (errors, streams, large answers, clients that are slow to read) is handed over
in the end: the request goes to the front of aiohttp's queue with its outcome in the place of its body. A stream may have
begun by then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from aiohttp.http import HttpRequestParser
from aiohttp.web_protocol import MAX_MSG_QUEUE_SIZE, RequestPayloadError, _ErrInfo

from minserve.frontend.access_log import AccessLogger
from minserve.frontend.passage import Carried

if TYPE_CHECKING:
    import asyncio

    from aiohttp.http import RawRequestMessage

    from minserve.frontend.passage import Carrier, Head, Passage

MAX_KNOWN = 4096  # bytes of a head that is kept: each connection may keep one
# Of an answer, and of a body where there is no shared memory: less than what transports hold without a complaint.
MAX_BYTES = 32 * 1024
HOLD_S = 0.01  # for the body behind a head; then aiohttp waits for it


class LaneHandler(web.RequestHandler):
    """aiohttp's handling of one connection, past which requests can be carried."""

    __slots__ = ("_carried", "_due", "_early", "_express", "_held", "_known", "_timer")

    def __init__(self, manager: web.Server, express: Carrier | None, **options: object) -> None:
        super().__init__(manager, **options)  # type: ignore[arg-type]
        self._express = express
        self._carried: Passage | None = None
        self._held: asyncio.Future[None] | None = None  # what aiohttp waits for, while a passage is under way
        self._known: Head | None = None  # of the last request
        # Bytes that the parser has to get before it stands between two requests again; below 0: nobody knows.
        self._due = 0
        self._early = b""  # a known head whose body has not come yet; the parser has not got it
        self._timer: asyncio.TimerHandle | None = None

    # ── what comes ──

    def past(self, data: bytes) -> bytes:
        """Carries a request whose head is the last one's. Returns the bytes that are for the parser: all or none.

        A parser that stands between two requests makes the same of the same bytes, so it need not be asked again. Many
        clients send head and body apart: a head that is alone waits a little for its body.
        """
        if self._early:
            data, self._early = self._early + data, b""
            self._stop_timer()
        known, waiter = self._known, self._waiter
        if known is None or self._due or waiter is None or waiter.done() or self._express is None:
            return data
        found = known.again(data)
        if found is None:
            return data
        start, size, headers = found
        if len(data) == start + size:
            if self._express.begin(self, known, headers, data[start:]):
                self._request_count += 1
                return b""
        elif len(data) == start and size <= MAX_BYTES:
            self._early = data
            self._timer = self._loop.call_later(HOLD_S, self.give_early)
            return b""
        return data

    def parse(self, data: bytes) -> None:
        """Bytes for the parser."""
        raise NotImplementedError

    def give_early(self) -> None:
        """The parser gets what was held back from it."""
        self._stop_timer()
        if self._early:
            data, self._early = self._early, b""
            self.parse(data)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def feed(self, data: bytes) -> None:
        """Gives bytes to the parser. aiohttp sleeps on: `go_on` is to be called once they have been looked at."""
        count, waiter = len(self._messages), self._waiter
        self._waiter = None
        super().data_received(data)
        self._waiter = waiter
        if self._due > 0:
            self._due = max(self._due - len(data), -1)
        elif self._due == 0 and data:
            self._known, self._due = None, -1
            if len(self._messages) == count + 1:
                self._look_at(self._messages[-1][0], data)

    def _look_at(self, message: RawRequestMessage | _ErrInfo, data: bytes) -> None:
        """A head has come in one piece, with these bytes, to a parser that stood between two requests."""
        begin = len(data) - len(data.lstrip(b"\r\n"))  # empty lines before a request are passed over
        end = data.find(b"\r\n\r\n", begin) + 4
        if isinstance(message, _ErrInfo) or message.chunked or message.upgrade or end < 4:
            return
        self._due = max(end + int(message.headers.get(hdrs.CONTENT_LENGTH, 0)) - len(data), -1)
        if self._express is not None and self._due >= 0 and end <= MAX_KNOWN:
            self._known = self._express.read(message, data[:end])

    def stand_between_requests(self) -> None:
        """A body has come that the parser does not know of, and it cannot be told. A new one takes its place."""
        self._parser = HttpRequestParser(
            self,
            self._loop,
            self._read_bufsize,
            max_line_size=self.max_line_size,
            max_field_size=self.max_field_size,
            max_headers=self.max_headers,
            payload_exception=RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=MAX_MSG_QUEUE_SIZE,
        )
        self._due = 0

    def go_on(self, data: bytes) -> None:
        """Wakes aiohttp for the requests that have come, unless these bytes are a single one and it can be carried."""
        waiter, known = self._waiter, self._known
        if waiter is None or waiter.done() or not self._messages:
            return
        message, content = self._messages[0]
        if known is not None and self._express is not None and not self._due and known.message is message:
            body = data[len(known.text) :]
            if len(body) == content.total_bytes and self._express.begin(self, known, message.raw_headers, body):
                return
        waiter.set_result(None)

    # ── a passage ──

    def carry(self, passage: Passage) -> None:
        """A passage begins."""
        assert self._manager is not None
        if self._messages:
            self._messages.clear()
            assert self._parser is not None
            self._parser.message_consumed()
        self._manager.requests_count += 1
        self._carried = passage
        self._held, self._waiter = self._waiter, None
        self._request_in_progress = True

    @property
    def takes_answer(self) -> bool:
        """Whether the client has taken all that it was sent before: then an answer need not be waited for."""
        return not self._paused and self.transport is not None and not self.transport.get_write_buffer_size()

    def now(self) -> float:
        """Seconds on the loop's clock."""
        return self._loop.time()

    def answer(self, data: bytes, passage: Passage, status: int) -> None:
        """Ends a passage with its whole answer."""
        transport, waiter = self.transport, self._held
        if transport is None or waiter is None:
            return
        transport.write(data)
        if self._logging_enabled and isinstance(self.access_logger, AccessLogger):
            message = passage.head.message
            seconds = self.now() - passage.since
            self.access_logger.tell(transport, message.method, message.path, message.version, status, seconds)
        self._held = None
        self._put_down()
        if waiter.done():
            return
        if self._force_close:
            waiter.cancel()
        elif self._close:
            waiter.cancel()
            transport.close()
        elif self._messages:
            waiter.set_result(None)
        else:
            self._waiter = waiter

    def begin_answer(self, data: bytes, passage: Passage) -> None:
        """Writes the first bytes of an answer whose rest is aiohttp's affair: `hand_over` comes next."""
        if self.transport is not None:
            self.transport.write(data)
            passage.sent = len(data)

    def hand_over(self, passage: Passage) -> None:
        """Ends a passage whose answer is aiohttp's affair."""
        waiter, self._held = self._held, None
        if waiter is not None and not waiter.done():
            self._messages.appendleft((passage.head.message, Carried(passage)))
            waiter.set_result(None)

    def take_over(self, passage: Passage) -> None:
        """What was handed over has arrived: who calls this sees to its end."""
        assert self._carried is passage
        self._carried = None

    def _put_down(self) -> None:
        self._carried = None
        self._request_in_progress = False
        if self._handler_waiter is not None and not self._handler_waiter.done():
            self._handler_waiter.set_result(None)  # the server ends, and has waited for this

    def log_access(self, request: web.BaseRequest, response: web.StreamResponse, time: float | None) -> None:
        """Called by aiohttp for each of its answers."""
        super().log_access(
            request, response, request.content.passage.since if isinstance(request.content, Carried) else time
        )

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client has left."""
        self._early = b""
        self._stop_timer()
        if self._carried is not None:
            self._carried.leave()
            self._put_down()
        super().connection_lost(exc)
