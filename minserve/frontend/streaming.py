"""A streaming answer: each chunk goes to the client as it comes, in chunked transfer encoding.

To a client that asks for server-sent events (the HTML standard, section 9.2) each chunk is one event.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import struct
from typing import TYPE_CHECKING, cast

from aiohttp import HttpVersion11, hdrs, web

from minserve.errors import MinServeError
from minserve.frontend.connection import STREAM_AHEAD
from minserve.frontend.passage import Carried

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aiohttp.http import StreamWriter
    from multidict import CIMultiDict

    from minserve.dispatch.request import Reply, Stream
    from minserve.frontend.connection import Connection
    from minserve.wire.messages import Buffer

logger = logging.getLogger(__name__)

# aiohttp frames no chunks for these: a body would be taken for the next answer's bytes
BODILESS = frozenset({204, 304})
EVENTS = "text/event-stream"
MORE = "ts_stream_next"  # by which TorchServe's clients know a stream
_NO_BUFFER = "X-Accel-Buffering"  # nginx would gather events
_LINE_END = re.compile(rb"\r\n|\r|\n")
_TEXT = re.compile(r"text/|application/[^;]*json", re.IGNORECASE)


async def stream_reply(
    request: web.Request, reply: Reply, stream: Stream, headers: CIMultiDict[str], stall_timeout: float
) -> web.StreamResponse:
    """Relays a stream until it ends. A client that leaves mutes it: the ranks run on, in step, for nobody.

    The next chunk is asked for once the client's socket has taken this one, or almost. So a client that does not read fills
    the stream's buffer, which holds back the ranks; the connection counts the seconds, and ends this call as if the client
    had left.

    A stream that breaks off ends without its last chunk and with a closed connection, so that no client takes the part for
    the whole. Where it is one of events, one called `error` with the error's JSON goes before.

    Args:
        stall_timeout: seconds for which the client may take no byte.
    """
    try:  # from the first line on: a stream that is not muted in the end would hold its ranks for ever
        as_events = make_stream_headers(headers, request.headers)
        begun = isinstance(request.content, Carried) and request.content.passage.sent > 0
        make = _Begun if begun else web.StreamResponse
        response = make(status=reply.status, reason=reply.reason, headers=headers)
        if request.version >= HttpVersion11:
            response.enable_chunked_encoding()
        else:
            response.force_close()  # to an HTTP/1.0 client the end of the connection is the end of the answer
        with cast("Connection", request.protocol).streaming(stall_timeout):
            writer = cast("StreamWriter", await response.prepare(request))
            while chunks := await stream.take(STREAM_AHEAD):
                if reply.status not in BODILESS:
                    await _write(writer, [event_of(chunk) for chunk in chunks] if as_events else chunks)
            await response.write_eof()
    except MinServeError as error:
        logger.warning("%s: stream broken off: %s", request.raw_path, error)
        if headers.get(hdrs.CONTENT_TYPE, "").startswith(EVENTS) and reply.status not in BODILESS:
            await _end_with_event(request, response, error, b"" if as_events else b"\n\n")
        else:
            break_off(request)
    except ConnectionError as error:  # seen before the loop has cancelled this call
        logger.debug("%s: the client has left its stream: %s", request.raw_path, error)
    finally:
        stream.mute()
    return response


class _Begun(web.StreamResponse):
    """An answer whose head `frontend.express` has written already."""

    async def _write_headers(self) -> None:
        pass


async def _write(writer: StreamWriter, chunks: Sequence[Buffer]) -> None:
    """Writes the chunks that are there, each framed as one of its own, and waits until the socket has room for more.

    aiohttp takes one at a time, which costs more than all else that is done for a chunk.
    """
    if len(chunks) == 1:
        await writer.write(chunks[0], drain=False)
    elif not writer.chunked:
        await writer.write(b"".join(chunks), drain=False)
    else:
        writer.chunked = False
        try:
            await writer.write(framed(chunks), drain=False)
        finally:
            writer.chunked = True
    await writer.drain()


def framed(chunks: Sequence[Buffer]) -> bytes:
    """Chunks as they are sent, but for one of nothing, which would be the end."""
    return b"".join([piece for chunk in chunks if len(chunk) for piece in (b"%x\r\n" % len(chunk), chunk, b"\r\n")])


def event_of(chunk: Buffer) -> bytes:
    """A chunk as the data of one event, of nothing none. Line ends alone do not stay as they are."""
    if not len(chunk):
        return b""
    return b"".join(b"data: %b\n" % line for line in _LINE_END.split(bytes(chunk))) + b"\n"


def make_stream_headers(headers: CIMultiDict[str], asked: Mapping[str, str]) -> bool:
    """Makes those of an answer those of a stream. Returns whether its chunks become events.

    Args:
        asked: the request's headers.
    """
    as_events = _shall_be_events(asked, headers)
    if as_events:
        headers[hdrs.CONTENT_TYPE] = EVENTS
        headers.setdefault(_NO_BUFFER, "no")
    headers[MORE] = "true"
    return as_events


def _shall_be_events(asked: Mapping[str, str], headers: CIMultiDict[str]) -> bool:
    """Whether chunks become events: the client asks for them by name, and the handler sends text that is none yet."""
    kind = headers.get(hdrs.CONTENT_TYPE, "")
    if kind.lower().startswith(EVENTS) or (kind and not _TEXT.match(kind)):
        return False
    for wanted in asked.get(hdrs.ACCEPT, "").lower().split(","):
        name, *parameters = (part.strip() for part in wanted.split(";"))
        if name == EVENTS:
            return not any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters)
    return False


async def _end_with_event(
    request: web.Request, response: web.StreamResponse, error: MinServeError, before: bytes
) -> None:
    """An `error` event, which a client sees as it sees the others, and the end of the connection without the last chunk.

    Args:
        before: ends the event that a handler may not have finished.
    """
    text = json.dumps({"code": error.status, "type": error.type_name, "message": str(error)})
    try:
        await response.write(b"%bevent: error\ndata: %b\n\n" % (before, text.encode()))
    except ConnectionError:
        return  # it has left meanwhile
    if request.transport is not None:
        request.transport.close()  # what waits in it still goes out


def break_off(request: web.Request) -> None:
    """Ends the connection of an answer that is not whole, so that its client sees that."""
    transport = request.transport
    if transport is None:
        return
    if request.version < HttpVersion11:  # has no last chunk to miss: only a reset says that this is no end
        client = transport.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
