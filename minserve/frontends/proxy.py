"""What is no prediction goes to the server as it came: there are the state, the keys and the checks of those routes.

A connection for each request, and its head byte for byte, without aiohttp's client, which adds, merges and rewrites: the
server judges `Host` and `Origin` as they were sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING

from aiohttp import ClientError, HttpVersion11, hdrs, web
from aiohttp.client_proto import ResponseHandler
from multidict import CIMultiDict

from minserve.errors import Unavailable
from minserve.frontend.body import send_continue
from minserve.frontend.headers import UNTYPED
from minserve.frontend.streaming import break_off

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

    from aiohttp.http import RawResponseMessage
    from aiohttp.streams import StreamReader

logger = logging.getLogger(__name__)

PASSED_ON = web.ResponseKey("passed_on", bool)  # of an answer that the server has counted
READ_AHEAD = 65536
# RFC 9110 section 7.6.1: these are about one connection, and a body is framed anew on the other.
_OF_CONNECTION = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade", b"expect")
    + (b"transfer-encoding", b"content-length")
)


class Proxy:
    """Passes requests on.

    Args:
        handing_over: a socket over which the server gets its ends of connections. Not one that it listens on: its file
            could be removed, and somebody else could connect to it.
    """

    def __init__(self, handing_over: socket.socket) -> None:
        self._handing_over = handing_over
        self._loop = asyncio.get_running_loop()

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Sends a request to the server and its answer to the client. Cancelling it ends both."""
        try:
            transport, server = await self._connect()
        except OSError as error:
            raise Unavailable(f"the server cannot be reached: {error.strerror}") from None
        server.set_response_params(
            skip_payload=request.method == hdrs.METH_HEAD, auto_decompress=False, read_bufsize=READ_AHEAD
        )
        wanted = asyncio.Event()
        try:
            async with _beside(self._send(request, transport, server, wanted)):
                message, content = await server.read()
                while message.code < 200:  # 100: it wants the body
                    wanted.set()
                    message, content = await server.read()
                return await _answer(request, message, content)
        except ClientError as error:
            raise Unavailable(f"the server has not answered: {error}") from None
        finally:
            transport.abort()

    async def _connect(self) -> tuple[asyncio.Transport, ResponseHandler]:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._handing_over, [b"\0"], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        ours.setblocking(False)
        return await self._loop.create_unix_connection(lambda: ResponseHandler(self._loop), sock=ours)

    async def _send(
        self, request: web.Request, transport: asyncio.Transport, server: ResponseHandler, wanted: asyncio.Event
    ) -> None:
        here = request.content.is_eof()
        declared = request.content.total_bytes if here else request.content_length
        head = [f"{request.method} {request.raw_path} HTTP/1.1\r\n".encode("utf-8", "surrogateescape")]
        head += [b"%b: %b\r\n" % (name, value) for name, value in _of_message(request.raw_headers)]
        if declared or hdrs.CONTENT_LENGTH in request.headers:
            head.append(b"Content-Length: %d\r\n" % (declared or 0))
        elif not here:
            head.append(b"Transfer-Encoding: chunked\r\n")
        if here:
            transport.write(b"".join([*head, b"\r\n", request.content.read_nowait()]))
            return
        transport.write(b"".join([*head, b"Expect: 100-continue\r\n\r\n"]))
        await wanted.wait()
        await send_continue(request)
        while piece := await request.content.readany():
            transport.write(piece if declared is not None else b"%x\r\n%b\r\n" % (len(piece), piece))
            await server._drain_helper()
        if declared is None:
            transport.write(b"0\r\n\r\n")


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    """Runs something until the block ends."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is not None:
            logger.debug("a request's body has not come whole: %s", task.exception())


async def _answer(request: web.Request, message: RawResponseMessage, content: StreamReader) -> web.StreamResponse:
    headers = CIMultiDict(
        (name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape"))
        for name, value in _of_message(message.raw_headers)
    )
    headers.setdefault(hdrs.CONTENT_TYPE, UNTYPED)
    length = message.headers.get(hdrs.CONTENT_LENGTH)
    if length is not None:
        headers[hdrs.CONTENT_LENGTH] = length
    response = web.StreamResponse(status=message.code, reason=message.reason, headers=headers)
    response[PASSED_ON] = True
    if message.should_close or not request.content.is_eof():
        response.force_close()
    if message.chunked and request.version >= HttpVersion11:
        response.enable_chunked_encoding()
    elif message.chunked:
        response.force_close()
    await response.prepare(request)
    try:
        while piece := await content.readany():
            await response.write(piece)
            await request.writer.drain()
        await response.write_eof()
    except ClientError as error:
        logger.warning("%s: the server has broken its answer off: %s", request.raw_path, error)
        _end_early(request)
    return response


def _end_early(request: web.Request) -> None:
    """The client shall see that it was not all, after what there is of it."""
    if request.version < HttpVersion11:
        break_off(request)
    elif request.transport is not None:
        request.transport.close()


def _of_message(headers: tuple[tuple[bytes, bytes], ...]) -> Iterator[tuple[bytes, bytes]]:
    return ((name, value) for name, value in headers if name.lower() not in _OF_CONNECTION)
