"""All client connections of one port: how many there may be, and a look at each once a second."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol, cast

from aiohttp import web

from minserve.errors import Unavailable
from minserve.frontend.access_log import ACCESS, AccessLogger
from minserve.frontend.connection import Connection
from minserve.frontend.errors import error_response
from minserve.frontend.headers import REQUEST_ID, request_id

if TYPE_CHECKING:
    from minserve.config.server import ServerOptions
    from minserve.frontend.passage import Carrier

SHUTDOWN_TIMEOUT_S = 5.0  # for clients that are slow to read an answer; by then no request is left in flight
LOOK_EVERY_S = 1.0
READ_AHEAD = 65536  # bytes read of a body that nobody wants yet, twice that at most
LINGER_S = 5.0  # how long the rest of a refused body is read, so that its sender sees the answer and no reset


class Counting(Protocol):
    """Who counts answers."""

    def answered(self, status: int) -> None:
        """Counts one."""


class Connections(web.Server):
    """The connections of one port. Made from aiohttp's own server of an application.

    Args:
        express: carries what may go past the application; None: nothing does.
    """

    def __init__(
        self,
        plain: web.Server,
        options: ServerOptions,
        metrics: Counting | None = None,
        express: Carrier | None = None,
    ) -> None:
        # A client that disconnects cancels its request, which takes it out of the queue.
        super().__init__(plain.request_handler, request_factory=plain.request_factory, handler_cancellation=True)
        self.options = options
        self._metrics = metrics
        self._express = express
        self._look_soon()

    def __call__(self) -> web.RequestHandler:
        """A new connection. Decompression would let a small body grow."""
        return Connection(
            self,
            self._express,
            loop=self._loop,
            access_log=ACCESS if self.options.access_log else None,
            access_log_class=AccessLogger,
            auto_decompress=False,
            read_bufsize=READ_AHEAD,
            lingering_time=LINGER_S,
        )

    @property
    def full(self) -> bool:
        """Whether one more connection would be one too many."""
        return len(self._connections) >= self.options.max_connections

    def refuse(self, transport: asyncio.Transport) -> None:
        """Takes over a connection that is one too many."""
        self.answered(503)
        transport.set_protocol(_Refused(transport, self.options.max_connections))

    def answered(self, status: int) -> None:
        """Counts an answer that goes past the application."""
        if self._metrics is not None:
            self._metrics.answered(status)

    async def shutdown(self, timeout: float | None = None) -> None:
        """Ends all connections, those at work after at most `timeout` seconds."""
        self._timer.cancel()
        await super().shutdown(timeout)

    def look(self, now: float) -> None:
        """Ends the connections that have waited for something for too long."""
        for connection, transport in list(self._connections.items()):
            cast("Connection", connection).look(transport, now)

    def _look_soon(self) -> None:
        self._timer = self._loop.call_later(LOOK_EVERY_S, self._look_and_again)

    def _look_and_again(self) -> None:
        self._look_soon()
        self.look(self._loop.time())


class _Refused(asyncio.Protocol):
    """A connection over the limit: answered at once, whatever it wants, and closed.

    Closed with its first bytes, taken from the kernel and dropped: with unread ones there the client would get a reset,
    perhaps before it has seen the answer.
    """

    def __init__(self, transport: asyncio.Transport, limit: int) -> None:
        self._transport = transport
        error = Unavailable(f"the server has {limit} client connections, max_connections allows no more")
        response = error_response(error)
        body = cast("bytes", response.body)
        fields = {**response.headers, "Server": "minserve", REQUEST_ID: request_id({}), "Content-Length": len(body)}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        transport.write(f"HTTP/1.1 503 Service Unavailable\r\n{head}Connection: close\r\n\r\n".encode() + body)
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, transport.close)

    def data_received(self, data: bytes) -> None:
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
