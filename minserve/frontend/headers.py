"""What is in the head of every answer: the server's name, the request's id, and that nobody may keep it."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, cast

from aiohttp import HttpVersion11, hdrs, web
from multidict import CIMultiDict, istr

from minserve.errors import NotFound
from minserve.frontend.errors import NO_SUCH_PATH, error_response

if TYPE_CHECKING:
    from collections.abc import Mapping

REQUEST_ID = istr("x-request-id")
USUAL = CIMultiDict(
    (
        (hdrs.SERVER, "minserve"),
        (hdrs.PRAGMA, "no-cache"),  # these three are TorchServe's, word for word
        (hdrs.CACHE_CONTROL, "no-cache; no-store, must-revalidate, private"),
        (hdrs.EXPIRES, "Thu, 01 Jan 1970 00:00:00 UTC"),
    )
)
UNTYPED = ""  # stands for Content-Type on an answer that shall have none: aiohttp sets its own where it is missing
ID = web.RequestKey("request_id", str)
_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def request_id(headers: Mapping[str, str]) -> str:
    """The client's x-request-id where it is fit to be logged, else a fresh one."""
    return client_id(headers) or fresh_id()


def client_id(headers: Mapping[str, str]) -> str:
    """The client's x-request-id where it is fit to be logged, else ""."""
    given = headers.get(REQUEST_ID)
    return given if given and _CLIENT_ID.fullmatch(given) else ""


def fresh_id() -> str:
    """A random UUID, as TorchServe gives. `uuid.uuid4` takes four times as long, and this one guards nothing."""
    digits = random.getrandbits(128).to_bytes(16, "big").hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


def add_usual(headers: CIMultiDict[str]) -> None:
    """Adds what every answer has. A handler that has set one of these knows better, but for the server's name."""
    headers.popall(hdrs.SERVER, None)
    for name, value in USUAL.items():
        headers.setdefault(name, value)


def finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Called for each answer before its headers go out."""
    headers = response.headers
    if hdrs.EXPIRES not in headers:  # those of predictions have all of them already
        add_usual(headers)
    if REQUEST_ID not in headers:  # an error's answer has the id that the handler has seen, if it came that far
        headers[REQUEST_ID] = request.get(ID) or request_id(request.headers)
        if isinstance(response, web.HTTPException):
            _make_ours(response)
    end_headers(headers, keep_alive=request.version >= HttpVersion11)


def end_headers(headers: CIMultiDict[str], keep_alive: bool) -> None:
    """What is done last to the headers of an answer.

    Args:
        keep_alive: the connection stays open unless the headers say that it does not.
    """
    if headers.get(hdrs.CONTENT_TYPE) == UNTYPED:
        del headers[hdrs.CONTENT_TYPE]
    if keep_alive and hdrs.CONNECTION not in headers:
        headers[hdrs.CONNECTION] = "keep-alive"  # goes without saying in HTTP/1.1; TorchServe says it, and so some look


def _make_ours(response: web.Response) -> None:
    """A target without a path, as of CONNECT or `GET http://host`, has no route and so aiohttp's own 404.

    The connection ends: what the sender of CONNECT takes for a tunnel must not be read as requests.
    """
    ours = error_response(NotFound(NO_SUCH_PATH))
    body = cast("bytes", ours.body)
    response.body = body
    response.headers.update({**ours.headers, hdrs.CONTENT_LENGTH: str(len(body)), hdrs.CONNECTION: "close"})
    response.force_close()
