"""What is wrong with a request's head although the parser lets it pass."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from aiohttp import HttpVersion10, HttpVersion11

from minserve.errors import BadRequest
from minserve.frontend.errors import refusal

if TYPE_CHECKING:
    from aiohttp.http import RawRequestMessage

    from minserve.errors import MinServeError

MAX_HEAD = 65536  # bytes of a whole head; aiohttp bounds each line of it and their number


def wrong_with(message: RawRequestMessage) -> MinServeError | None:
    """The error that a head is, or None."""
    if not HttpVersion10 <= message.version <= HttpVersion11:
        return refusal(505, f"HTTP/{message.version.major}.{message.version.minor}: allowed are 1.0 and 1.1")
    if message.chunked and message.version == HttpVersion10:  # RFC 9112 section 6.1: it is to be taken for faulty
        return BadRequest("bad request: Transfer-Encoding in HTTP/1.0")
    if sum(map(len, chain(*message.raw_headers))) > MAX_HEAD:
        return head_too_large()
    return None


def head_too_large() -> MinServeError:
    """Of one that is whole, or not yet."""
    return refusal(431, f"the head of the request is over {MAX_HEAD} bytes")
