"""Errors as clients see them: TorchServe's JSON, with the cause in `message` and never a traceback."""

from __future__ import annotations

import functools
import json
import logging
import math
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, InvalidURLError, LineTooLong

from minserve.errors import BadRequest, BodyTooLarge, MinServeError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

logger = logging.getLogger(__name__)

JSON = "application/json"
NO_SUCH_PATH = "Requested resource is not found, please refer to API document."
RETRY_AFTER_S = range(1, 61)  # a longer one is a guess about a future that nobody knows


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
        response.headers["Retry-After"] = str(_retry_after(error.retry_after))
    return response


def _retry_after(seconds: float | None) -> int:
    """Whole seconds; HTTP knows no fractions."""
    if seconds is None or not seconds > RETRY_AFTER_S[0]:
        return RETRY_AFTER_S[0]
    return RETRY_AFTER_S[-1] if seconds > RETRY_AFTER_S[-1] else math.ceil(seconds)


def refusal(status: int, message: str) -> BadRequest:
    """An error with a status of HTTP's own that has no class in the tree: 408, 417, 431, 505."""
    error = BadRequest(message)
    error.status = status
    if status == 408:
        error.type_name = "RequestTimeoutException"
    return error


def errors_as_json(handler: Handler) -> Handler:
    """Turns every exception into an answer. What nobody foresaw is a 500 that says so, its traceback is for the log."""

    @functools.wraps(handler)
    async def answered(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except MinServeError as error:
            return refuse(request, error)
        except web.HTTPException as error:
            return refuse(request, _from_aiohttp(error))
        except Exception:
            if request.writer.output_size:  # of a stream: the connection logs it, and breaks off
                raise
            logger.exception("%s %s: unforeseen", request.method, request.raw_path)
            return refuse(request, MinServeError("Internal error; the log has its traceback"))

    return answered


def refuse(request: web.Request, error: MinServeError) -> web.Response:
    """The answer that an error becomes. It ends a connection whose body broke off, or whose body need not be sent now.

    A client that asked with `Expect` may not send it, and nobody could tell its next request from the body.
    """
    response = error_response(error)
    if request.content.exception() is not None or not request.content.is_eof():
        response.force_close()
    return response


def _from_aiohttp(error: web.HTTPException) -> MinServeError:
    message = error.text or error.reason
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return BodyTooLarge(message)
    if error.status < 500:
        return refusal(error.status, message)
    other = MinServeError(message)
    other.status = error.status
    return other


def from_parser(error: BaseException | None) -> MinServeError:
    """The error of ours for what aiohttp met on a connection. Its own message quotes the client's bytes at length."""
    if isinstance(error, MinServeError):
        return error
    if isinstance(error, LineTooLong):
        return refusal(431, f"a line of the request's head is over {error.args[1]} bytes")
    if isinstance(error, HttpProcessingError | web.RequestPayloadError):
        text = str(getattr(error, "message", error))
        lines = [line.strip().rstrip(":") for line in text.splitlines() if line.strip()]
        what = next((line for line in lines if line != "Bad status line"), "malformed")
        status = 431 if "Too many headers" in what else 400
        bad = "bad target" if isinstance(error, InvalidURLError) else "bad request"
        return refusal(status, f"{bad}: {ascii(what[:200])[1:-1]}")
    return MinServeError("Internal error; the log has its traceback")
