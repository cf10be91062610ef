import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, make_mocked_request

from minserve import errors
from minserve.frontend.errors import error_response, errors_as_json
from minserve.frontend.routing import READ, add_route
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
    add_route(app.router, READ, "/", handler)
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
        await errors_as_json(make_mocked_request("GET", "/"), cancelled)
