"""The two aiohttp applications: inference and management."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import http_parser, web

from minserve.errors import StartupError
from minserve.frontend.health import Health
from minserve.frontend.inference import Inference, finish_headers
from minserve.frontend.management import Management
from minserve.frontend.routing import add_not_found

if TYPE_CHECKING:
    from minserve.registry.models import Registry


SHUTDOWN_TIMEOUT_S = 5.0  # for clients that are slow to read an answer; by then no request is left in flight


def inference_app(registry: Registry, max_request_size: int) -> web.Application:
    """What listens on the inference port."""
    app = _application(max_request_size)
    Health(registry).add_routes(app.router)
    Inference(registry).add_routes(app.router)
    add_not_found(app.router)
    return app


def management_app(registry: Registry, max_request_size: int) -> web.Application:
    """What listens on the management port."""
    app = _application(max_request_size)
    Health(registry).add_routes(app.router)
    Management(registry).add_routes(app.router)
    add_not_found(app.router)
    return app


def _application(max_request_size: int) -> web.Application:
    app = web.Application(client_max_size=max_request_size)
    app.on_response_prepare.append(finish_headers)
    return app


def runner(app: web.Application) -> web.AppRunner:
    """Runs an application.

    `handler_cancellation`: a client that disconnects cancels its request, which takes it out of the queue. An access log
    costs as much as the rest of aiohttp. `auto_decompress` would let a small body grow past the limit.
    """
    return web.AppRunner(
        app, handler_cancellation=True, access_log=None, auto_decompress=False, shutdown_timeout=SHUTDOWN_TIMEOUT_S
    )


def require_c_parser() -> None:
    """The pure Python parser is slower by an order of magnitude, and not the one that was tested.

    Raises:
        StartupError: aiohttp was installed without its C extension.
    """
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise StartupError("aiohttp runs without its C parser; reinstall it from a wheel for this platform")
