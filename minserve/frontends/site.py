"""What a frontend process serves on the port that it shares with the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from minserve.frontend.admission import InFlightBytes
from minserve.frontend.aliases import Aliases
from minserve.frontend.connections import SHUTDOWN_TIMEOUT_S, Connections
from minserve.frontend.cors import Cors
from minserve.frontend.express import EXPRESS, Express
from minserve.frontend.headers import finish_headers
from minserve.frontend.kserve import KServePredictions
from minserve.frontend.routing import add_not_found
from minserve.frontends.proxy import PASSED_ON, Proxy
from minserve.frontends.remote import RemoteInference, RemoteModels, RemoteRoutes

if TYPE_CHECKING:
    import asyncio

    from aiohttp.web_protocol import RequestHandler

    from minserve.config.server import ServerOptions
    from minserve.frontends.recorded import Measured
    from minserve.frontends.shared import Shared
    from minserve.frontends.uplink import Uplink


def application(
    uplink: Uplink, measured: Measured, options: ServerOptions, proxy: Proxy, shared: Shared, own: int
) -> web.Application:
    """Predictions by every path; all else goes to the server.

    Args:
        own: this process's place among the numbers that are shared.
    """
    app = web.Application(client_max_size=options.max_request_size)

    async def finish(request: web.Request, response: web.StreamResponse) -> None:
        finish_headers(request, response)
        if not response.get(PASSED_ON):
            measured.answered(response.status)

    app.on_response_prepare.append(finish)
    cors = Cors(options)
    if cors.on:
        app.on_response_prepare.append(cors.add_headers)
    routes = RemoteRoutes(app.router, otherwise=proxy.forward, uplink=uplink)
    models = RemoteModels(uplink, measured)
    in_flight = InFlightBytes(options.max_in_flight_bytes, shared.in_flight, own)
    inference = RemoteInference(models, options, in_flight, uplink)
    if not cors.on:
        app[EXPRESS] = Express(models, options, in_flight)  # the server looks at keys
    for these in (inference, KServePredictions(models, inference), Aliases(models, inference)):
        these.add_routes(routes)
    add_not_found(routes)
    return app


class SharedConnections(Connections):
    """The connections of one process; the limit is that of all of them together."""

    def __init__(
        self,
        plain: web.Server,
        options: ServerOptions,
        measured: Measured,
        express: Express | None,
        counts: memoryview,
        own: int,
    ) -> None:
        super().__init__(plain, options, measured, express)
        self._counts = counts
        self._own = own

    @property
    def full(self) -> bool:
        """Whether one more connection would be one too many."""
        return sum(self._counts) >= self.options.max_connections

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """There is one more."""
        super().connection_made(handler, transport)
        self._count()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """There is one less, now or once its request has ended."""
        super().connection_lost(handler, exc)
        if handler in self._connections and handler._task_handler is not None:
            handler._task_handler.add_done_callback(lambda _: self._count())
        self._count()

    def look(self, now: float) -> None:
        """See `Connections.look`."""
        super().look(now)
        self._count()

    def _count(self) -> None:
        self._counts[self._own] = len(self._connections)


class Runner(web.AppRunner):
    """Runs the application on connections that somebody else accepts."""

    __slots__ = ("_measured", "_options", "_own", "_shared")

    def __init__(
        self, app: web.Application, options: ServerOptions, measured: Measured, shared: Shared, own: int
    ) -> None:
        super().__init__(app, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
        self._options = options
        self._measured = measured
        self._shared = shared
        self._own = own

    async def _make_server(self) -> web.Server:
        plain, express = await super()._make_server(), self.app.get(EXPRESS)
        counts = self._shared.connections
        return SharedConnections(plain, self._options, self._measured, express, counts, self._own)
