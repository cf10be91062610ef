import asyncio
import json
import math
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import http_exceptions, web
from aiohttp.test_utils import TestClient, make_mocked_request

from minserve import errors
from minserve.frontend.errors import error_response, errors_as_json, from_parser
from minserve.frontend.routing import READ, Routes, add_route
from tests.unit.frontend.rig import Server

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(
    ("error", "status", "retryable"),
    [
        (errors.QueueFull("full"), 503, True),
        (errors.Draining("bye"), 503, True),
        (errors.ModelUnhealthy("gave up"), 503, False),
        (errors.WorkerFailed("rank 1 died"), 503, True),
        (errors.HandlerError("ValueError: no"), 503, False),
        (errors.HandlerOutOfMemory("no memory"), 507, False),
        (errors.ResponseTimeout("rank 0"), 504, True),
        (errors.DeadlineExceeded("late"), 504, False),
        (errors.RankProtocolError("rank 0"), 502, True),
        (errors.BadRequest("bad"), 400, False),
    ],
)
async def test_an_error_becomes_torchserves_json_and_says_when_to_try_again(
    error: errors.MinServeError, status: int, retryable: bool
) -> None:
    response = error_response(error)
    assert response.status == status
    assert isinstance(response.body, bytes)
    assert json.loads(response.body) == {"code": status, "type": error.type_name, "message": str(error)}
    assert ("Retry-After" in response.headers) == retryable


@pytest.mark.parametrize(
    ("seconds", "header"),
    [
        (None, "1"),
        (0.0, "1"),
        (-3.0, "1"),
        (0.2, "1"),
        (1.0, "1"),
        (1.01, "2"),
        (17.3, "18"),
        (60.0, "60"),
        (60.1, "60"),
        (math.inf, "60"),
        (math.nan, "1"),
    ],
)
async def test_retry_after_is_in_whole_seconds_of_a_minute(seconds: float | None, header: str) -> None:
    error = errors.QueueFull("full")
    error.retry_after = seconds
    assert error_response(error).headers.getall("Retry-After") == [header]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (errors.BodyTooLarge("too large"), 413, "too large"),
        (http_exceptions.LineTooLong(b"x" * 9000, 8190), 431, "a line of the request's head is over 8190 bytes"),
        (http_exceptions.BadHttpMessage("Too many headers received"), 431, "bad request: Too many headers received"),
        (
            http_exceptions.BadHttpMessage("Invalid character:\n\n  b'X: a\\x00b'\n        ^"),
            400,
            "bad request: Invalid character",
        ),
        (
            http_exceptions.BadStatusLine(error="Bad status line:\n  Invalid version:\n\n  b'x'"),
            400,
            "bad request: Invalid version",
        ),
        (http_exceptions.BadHttpMethod(error="Invalid method:\n\n  b'x'"), 400, "bad request: Invalid method"),
        (http_exceptions.BadStatusLine("Bad line"), 400, "bad request: Bad status line 'Bad line'"),
        (http_exceptions.InvalidURLError("x" * 9000), 400, "bad target: " + "x" * 200),
        (http_exceptions.BadHttpMessage(""), 400, "bad request: malformed"),
        (http_exceptions.BadHttpMessage("stray \udcff"), 400, "bad request: stray \\udcff"),
        (web.RequestPayloadError("no more"), 400, "bad request: no more"),
        (KeyError("/home/me/model.pt"), 500, "Internal error; the log has its traceback"),
        (None, 500, "Internal error; the log has its traceback"),
    ],
)
async def test_what_the_parser_met_is_told_without_the_clients_bytes(
    error: BaseException | None, status: int, message: str
) -> None:
    told = from_parser(error)
    assert (told.status, str(told)) == (status, message)


async def test_a_status_that_a_handler_asked_for_is_in_the_json_too() -> None:
    error = errors.HandlerError("no such word")
    error.status = 422
    response = error_response(error)
    assert isinstance(response.body, bytes)
    assert (response.status, json.loads(response.body)["code"]) == (422, 422)


async def raises_unforeseen(request: web.Request) -> web.StreamResponse:
    secret = "/home/me/model.pt"
    raise KeyError(secret)


async def raises_teapot(request: web.Request) -> web.StreamResponse:
    raise web.HTTPExpectationFailed(text="what do you expect?")


@pytest.mark.parametrize(
    ("handler", "status", "message"),
    [
        (raises_unforeseen, 500, "Internal error; the log has its traceback"),
        (raises_teapot, 417, "what do you expect?"),
    ],
)
async def test_no_exception_reaches_a_client_with_its_traceback(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    status: int,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = web.Application()
    add_route(Routes(app.router), READ, "/", handler)
    async with TestClient(Server(app)) as client, client.get("/") as response:
        assert response.status == status
        text = await response.text()
    assert json.loads(text)["message"] == message
    assert "model.pt" not in text
    assert ("model.pt" in caplog.text) == (status == 500), "the log has it"


async def test_a_cancelled_request_stays_cancelled() -> None:
    async def cancelled(request: web.Request) -> web.StreamResponse:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await errors_as_json(cancelled)(make_mocked_request("GET", "/"))
