"""The fast lane: a small prediction goes from the client's bytes to the dispatcher, and its answer back, without a task.

aiohttp's handling of a request costs more than everything else that the server does for it. Most requests need none of it:
a small body that has come with its head, for a model that is there, and a small answer. Those go this way. Everything else
goes aiohttp's, which is the reference: what it would answer is answered here, byte for byte. Of a stream the head and the
first chunk go this way, and the rest aiohttp's.
"""

from __future__ import annotations

import math
import re
from time import perf_counter
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http_writer import _serialize_headers

from minserve.dispatch.request import Request
from minserve.errors import MinServeError
from minserve.frontend.admission import request_timeout
from minserve.frontend.body import whole_type
from minserve.frontend.headers import REQUEST_ID, USUAL, client_id, end_headers, fresh_id
from minserve.frontend.inference import METHODS, headers_of
from minserve.frontend.lane import MAX_BYTES
from minserve.frontend.passage import Head, Passage
from minserve.frontend.streaming import BODILESS, event_of, framed, make_stream_headers
from minserve.wire.messages import Part, RequestMeta

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp.http import RawRequestMessage
    from multidict import CIMultiDict

    from minserve.config.server import ServerOptions
    from minserve.dispatch.request import Reply, Stream
    from minserve.frontend.admission import InFlightBytes
    from minserve.frontend.lane import LaneHandler
    from minserve.frontend.models import Models
    from minserve.frontend.passage import Headers
    from minserve.wire.messages import Buffer

EXPRESS: web.AppKey[Express] = web.AppKey("express")  # of an application, where it has one
MOST_SHARED = 128 * 1024  # bytes of a body where there is shared memory: as many may come with one read
_METHODS = frozenset(METHODS)
# A name with anything else in it may have to be decoded first.
_PATH = re.compile(r"/predictions/([\w-][\w.-]*)(?:/([\w-][\w.-]*))?", re.ASCII)
_USUAL = "".join(f"{name}: {value}\r\n" for name, value in USUAL.items())


class Express:
    """Carries what may be carried on the connections of one port.

    Args:
        in_flight: the bytes of bodies, of the other lane too.
        key: whether a request with these headers has the key that it needs; None: none is needed.
    """

    def __init__(
        self,
        registry: Models,
        options: ServerOptions,
        in_flight: InFlightBytes,
        key: Callable[[Mapping[str, str]], bool] | None = None,
    ) -> None:
        self._registry = registry
        self._metrics = registry.metrics
        self._in_flight = in_flight
        self._key = key
        self._largest_request = min(options.max_request_size, MOST_SHARED)
        self._largest_answer = min(options.max_response_size, MAX_BYTES)

    # ── there ──

    def read(self, message: RawRequestMessage, text: bytes) -> Head | None:
        """What is to be known of a head, and its bytes; None: its request cannot be carried."""
        if message.method not in _METHODS or message.version is not HttpVersion11:
            return None
        match, headers = _PATH.fullmatch(message.path), message.headers
        length, content_type = headers.get(hdrs.CONTENT_LENGTH), whole_type(headers.get(hdrs.CONTENT_TYPE, ""))
        if match is None or message.should_close or length is None or content_type is None or hdrs.EXPECT in headers:
            return None
        try:
            timeout = request_timeout(headers, math.inf)
        except MinServeError:
            return None
        around = _around_length(message.raw_headers, text)
        if around is None:
            return None
        return Head(text, *around, message, match[1], match[2], content_type, timeout, client_id(headers))

    def begin(self, connection: LaneHandler, head: Head, headers: Headers, body: bytes) -> bool:
        """Whether it carries a request. If not, nothing has happened to it."""
        size = len(body)
        if size > self._largest_request or not connection.takes_answer:
            return False
        if self._key is not None and not self._key(head.message.headers):
            return False
        began, since = perf_counter(), connection.now()
        share = self._in_flight.share()
        bodies: list[Buffer] = [body]
        try:
            model = self._registry.find(head.model, head.version)
            arena = model.dispatcher.arena
            if arena is None and size > MAX_BYTES:
                return False
            share.grow(size)
        except MinServeError:
            return False
        if arena is not None and size > MAX_BYTES:
            share.share_large(bodies, arena)
        passage = Passage(self, connection, head, model, share, began, since)
        meta = RequestMeta(head.id or fresh_id(), headers, (Part("body", head.content_type, size),))
        deadline = since + min(head.timeout, model.spec.request_timeout)
        passage.asked = asked = Request(meta, bodies, deadline, passage, named=head.version is not None)
        asked.segments = share.segments
        connection.carry(passage)
        try:
            model.dispatcher.begin(asked)
        except MinServeError as error:
            passage.set_exception(error)
        return True

    # ── and back ──

    def arrived(self, passage: Passage) -> None:
        """A passage has its answer or its error. It ends here, one way or the other."""
        replied, asked, dispatcher = perf_counter(), passage.asked, passage.model.dispatcher
        failed = passage.exception() is not None
        dispatcher.finish(asked, answered=not failed)
        connection = passage.connection
        reply = None if failed else passage.result()
        if reply is None or not self._ordinary(reply) or not connection.takes_answer:
            if reply is not None and reply.stream is not None and connection.takes_answer:
                self._begin_stream(passage, reply, reply.stream)
            connection.hand_over(passage)
            return
        self._metrics.answered(reply.status)
        connection.answer(b"".join((_head(reply, asked.meta.id), reply.body)), passage, reply.status)
        dispatcher.meters.frontend.record(asked.entered - passage.began + perf_counter() - replied)
        passage.end()

    def _begin_stream(self, passage: Passage, reply: Reply, stream: Stream) -> None:
        """Writes the head of a stream and its first chunk: until aiohttp comes to that, a small batch could be worked on."""
        if reply.status in BODILESS or stream.waiting > MAX_BYTES:
            return
        headers = headers_of(reply, passage.asked.meta.id)
        as_events = make_stream_headers(headers, passage.head.message.headers)
        headers[hdrs.TRANSFER_ENCODING] = "chunked"
        chunks = stream.take_ready(MAX_BYTES)
        if as_events:
            chunks = [event_of(chunk) for chunk in chunks]
        passage.connection.begin_answer(_serialized(reply, headers) + framed(chunks), passage)

    def _ordinary(self, reply: Reply) -> bool:
        return (
            reply.stream is None
            and len(reply.body) <= self._largest_answer
            and reply.status >= 200
            and reply.status not in BODILESS
        )


def _around_length(headers: Headers, text: bytes) -> tuple[bytes, bytes, int] | None:
    """A head's bytes before and after the digits of Content-Length, and which of the headers that is."""
    for place, (name, digits) in enumerate(headers):
        if name.lower() == b"content-length":
            value = text.find(b"\r\n%b:" % name) + len(name) + 3
            start = text.find(digits, value)
            end = start + len(digits)
            if text[value:start].strip(b" \t") or not text.startswith(b"\r\n", end):
                return None
            return text[:start], text[end:], place
    return None


def _head(reply: Reply, id_: str) -> bytes:
    """The head of an answer, as aiohttp would write it after `headers_of` and `finish_headers`."""
    size = len(reply.body)
    if not reply.headers and not reply.reason:
        head = f"HTTP/1.1 {reply.status} \r\n{_USUAL}{REQUEST_ID}: {id_}\r\n"
        return f"{head}Content-Length: {size}\r\nDate: {rfc822_formatted_time()}\r\nConnection: keep-alive\r\n\r\n".encode()
    headers = headers_of(reply, id_)
    headers[hdrs.CONTENT_LENGTH] = str(size)
    return _serialized(reply, headers)


def _serialized(reply: Reply, headers: CIMultiDict[str]) -> bytes:
    """A head of these headers, but for those that aiohttp sets."""
    headers.setdefault(hdrs.DATE, rfc822_formatted_time())
    end_headers(headers, keep_alive=True)
    return _serialize_headers(f"HTTP/1.1 {reply.status} {reply.reason}", headers)
