"""The two aiohttp applications, inference and management, and what runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import http_parser, web

from minserve.errors import StartupError
from minserve.frontend.connections import Connections
from minserve.frontend.headers import finish_headers
from minserve.frontend.health import Health
from minserve.frontend.inference import Inference
from minserve.frontend.management import Management
from minserve.frontend.routing import add_not_found

if TYPE_CHECKING:
    from minserve.config.server import ServerOptions
    from minserve.registry.models import Registry


SHUTDOWN_TIMEOUT_S = 5.0  # for clients that are slow to read an answer; by then no request is left in flight


def inference_app(registry: Registry, options: ServerOptions) -> web.Application:
    """What listens on the inference port."""
    app = _application(options)
    Health(registry).add_routes(app.router)
    Inference(registry, options).add_routes(app.router)
    add_not_found(app.router)
    return app


def management_app(registry: Registry, options: ServerOptions) -> web.Application:
    """What listens on the management port."""
    app = _application(options)
    Health(registry).add_routes(app.router)
    Management(registry).add_routes(app.router)
    add_not_found(app.router)
    return app


def _application(options: ServerOptions) -> web.Application:
    app = web.Application(client_max_size=options.max_request_size)
    app.on_response_prepare.append(finish_headers)
    return app


def runner(app: web.Application, options: ServerOptions) -> web.AppRunner:
    """Runs an application, with our own connections in place of aiohttp's."""
    return _Runner(app, options)


class _Runner(web.AppRunner):
    __slots__ = ("_options",)

    def __init__(self, app: web.Application, options: ServerOptions) -> None:
        super().__init__(app, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
        self._options = options

    async def _make_server(self) -> web.Server:
        return Connections(await super()._make_server(), self._options)


def require_c_parser() -> None:
    """The pure Python parser is slower by an order of magnitude, and not the one that was tested.

    Raises:
        StartupError: aiohttp was installed without its C extension.
    """
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise StartupError("aiohttp runs without its C parser; reinstall it from a wheel for this platform")
