"""A streaming answer: each chunk goes to the client as it comes, in chunked transfer encoding."""

from __future__ import annotations

import logging
import socket
import struct
from typing import TYPE_CHECKING, cast

from aiohttp import HttpVersion11, web

from minserve.errors import MinServeError

if TYPE_CHECKING:
    from multidict import CIMultiDict

    from minserve.dispatch.request import Reply, Stream
    from minserve.frontend.connection import Connection

logger = logging.getLogger(__name__)

# aiohttp frames no chunks for these: a body would be taken for the next answer's bytes
BODILESS = frozenset({204, 304})


async def stream_reply(
    request: web.Request, reply: Reply, stream: Stream, headers: CIMultiDict[str], stall_timeout: float
) -> web.StreamResponse:
    """Relays a stream until it ends. A client that leaves mutes it: the ranks run on, in step, for nobody.

    The next chunk is asked for once the client's socket has taken this one, or almost. So a client that does not read fills
    the stream's buffer, which holds back the ranks; the connection counts the seconds, and ends this call as if the client
    had left.

    A stream that breaks off ends without its last chunk and with a closed connection, so that no client takes the part for
    the whole.

    Args:
        stall_timeout: seconds for which the client may take no byte.
    """
    try:  # from the first line on: a stream that is not muted in the end would hold its ranks for ever
        response = web.StreamResponse(status=reply.status, reason=reply.reason or None, headers=headers)
        if request.version >= HttpVersion11:
            response.enable_chunked_encoding()
        else:
            response.force_close()  # to an HTTP/1.0 client the end of the connection is the end of the answer
        with cast("Connection", request.protocol).streaming(stall_timeout):
            await response.prepare(request)
            while (chunk := await stream.next()) is not None:
                if reply.status not in BODILESS:
                    await response.write(chunk)
                    await request.writer.drain()  # aiohttp does it every 64 KiB only
            await response.write_eof()
    except MinServeError as error:
        logger.warning("%s: stream broken off: %s", request.raw_path, error)
        _break_off(request)
    except ConnectionError as error:  # seen before the loop has cancelled this call
        logger.debug("%s: the client has left its stream: %s", request.raw_path, error)
    finally:
        stream.mute()
    return response


def _break_off(request: web.Request) -> None:
    transport = request.transport
    if transport is None:
        return
    if (
        request.version < HttpVersion11
    ):  # has no last chunk that could be missing: only a reset says that this is no end
        client = transport.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
