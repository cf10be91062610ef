"""Clients' connections, shared out among the frontend processes. All of them accept on one listening socket.

Not SO_REUSEPORT: there the kernel deals connections out by a hash, so that of four clients often none or all four come to
one process, those in the queue of a process that dies are lost, and another server could bind the same port unnoticed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

    from aiohttp import web

logger = logging.getLogger(__name__)

YIELD_S = 0.001  # for one with fewer connections to take the next; it may be at work, or have been stopped
RETRY_S = 1.0  # when there are no descriptors left


class Accepting:
    """Accepts connections, as long as no other process has fewer.

    With connections that stay, as those of most clients and balancers, that is what keeps all processes at work.

    Args:
        listener: non-blocking.
        server: makes a protocol for each connection.
        counts: open connections, by process.
        own: this process's place among them.
        handshake_timeout: seconds, of TLS.
    """

    def __init__(
        self,
        listener: socket.socket,
        server: web.Server,
        counts: memoryview,
        own: int,
        context: ssl.SSLContext | None,
        handshake_timeout: float,
    ) -> None:
        self._listener = listener
        self._server = server
        self._counts = counts
        self._own = own
        self._context = context
        self._handshake_timeout = handshake_timeout if context is not None else None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._connecting: set[asyncio.Task[None]] = set()
        self._listen()

    def stop(self) -> None:
        """Accepts nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()

    def _listen(self, may_yield: bool = True) -> None:
        self._timer = None
        self._may_yield = may_yield
        self._loop.add_reader(self._listener, self._accept)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._timer = self._loop.call_later(seconds, self._listen, False)

    def _accept(self) -> None:
        """One connection: who accepts all that wait takes them from the others."""
        if self._may_yield and self._has_more_than_others():
            self._pause(YIELD_S)
            return
        self._may_yield = True
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another process was faster, or the client has left
        except OSError as error:
            logger.error("no connection can be accepted: %s", error.strerror)
            self._pause(RETRY_S)
            return
        client.setblocking(False)
        if client.family != socket.AF_UNIX:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._connect(client))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def _has_more_than_others(self) -> bool:
        own = self._counts[self._own] + len(self._connecting)
        return own - own // 8 > min(self._counts)  # of many, a few more do not matter

    async def _connect(self, client: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._server, client, ssl=self._context, ssl_handshake_timeout=self._handshake_timeout
            )
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            logger.debug("a client has not come as far as HTTP: %s", error)
            client.close()
