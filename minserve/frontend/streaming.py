"""A streaming answer: each chunk goes to the client as it comes, in chunked transfer encoding."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, web

from minserve.errors import MinServeError

if TYPE_CHECKING:
    from multidict import CIMultiDict

    from minserve.dispatch.request import Reply, Stream

logger = logging.getLogger(__name__)

BODILESS = frozenset(
    {204, 304}
)  # aiohttp frames no chunks for these: a body would be taken for the next answer's bytes


async def stream_reply(
    request: web.Request, reply: Reply, stream: Stream, headers: CIMultiDict[str]
) -> web.StreamResponse:
    """Relays a stream until it ends. A client that leaves mutes it: the ranks run on, in step, for nobody.

    A stream that breaks off ends without its last chunk and with a closed connection, so that no client takes the part for
    the whole.
    """
    response = web.StreamResponse(status=reply.status, reason=reply.reason or None, headers=headers)
    if request.version >= HttpVersion11:
        response.enable_chunked_encoding()
    else:
        response.force_close()  # to an HTTP/1.0 client the end of the connection is the end of the answer
    try:
        await response.prepare(request)
        while (chunk := await stream.next()) is not None:
            if reply.status not in BODILESS:
                await response.write(chunk)
        await response.write_eof()
    except MinServeError as error:
        logger.warning("%s: stream broken off: %s", request.raw_path, error)
        if request.transport is not None:
            request.transport.abort()
    except ConnectionError as error:  # seen before the loop has cancelled this call
        logger.debug("%s: the client has left its stream: %s", request.raw_path, error)
    finally:
        stream.mute()
    return response
