"""Errors as clients see them: TorchServe's JSON, with the cause in `message` and never a traceback."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from minserve.errors import BodyTooLarge, MinServeError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

JSON = "application/json"
RETRY_AFTER_S = 1


def json_response(value: object, status: int = 200) -> web.Response:
    """A JSON answer as TorchServe writes them: two spaces, a newline at the end."""
    try:
        body = msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
    except UnicodeEncodeError:  # a file name that is no UTF-8, in a message about it
        body = json.dumps(value, indent=2).encode() + b"\n"
    return web.Response(body=body, status=status, content_type=JSON)


def error_response(error: MinServeError) -> web.Response:
    """The answer that an error of ours becomes."""
    response = json_response({"code": error.status, "type": error.type_name, "message": str(error)}, error.status)
    if error.retryable:
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Turns every exception into an answer. What nobody foresaw is a 500 that says so, its traceback is for the log."""
    try:
        return await handler(request)
    except MinServeError as error:
        return error_response(error)
    except web.HTTPException as error:
        return error_response(_from_aiohttp(error))
    except Exception:
        logger.exception("%s %s: unforeseen", request.method, request.raw_path)
        return error_response(MinServeError("Internal error; the log has its traceback"))


def _from_aiohttp(error: web.HTTPException) -> MinServeError:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return BodyTooLarge(error.text or "the request body is too large")
    other = MinServeError(error.text or error.reason)
    other.status = error.status
    return other
