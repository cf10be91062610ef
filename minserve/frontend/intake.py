"""The rest of a large body, from the client's socket straight to the memory where it is to lie.

aiohttp's way costs a body three copies more, of which two go to fresh memory: from the loop's buffer into bytes, by the
parser into others, and from there to where it stays. A body whose length is declared needs no parser: so many bytes, and
the next request begins. While they come an `Intake` takes the connection's place at its transport, and the loop, or TLS,
writes to the body's own memory.

The parser cannot be told of bytes that it never gets. Behind the body the connection has a new one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp.streams import StreamReader

    from minserve.frontend.connection import Connection

WORTH = 32 * 1024  # bytes still to come, from which on it is worth the change of protocols and the new parser
STEP = 256 * 1024  # bytes of one read
TURN = 1024 * 1024  # bytes after which other clients have their turn: some 200 µs. uvloop would read 32 steps on end
_NOWHERE = memoryview(b"")  # an empty piece of the body's memory would hold on to all of it


class Intake(asyncio.BufferedProtocol):
    """Takes the rest of a body.

    Args:
        content: the body as aiohttp knows it. It has its end when the last byte has come, and an error when none comes.
        rest: memory for just the bytes that are still to come.
    """

    def __init__(self, connection: Connection, content: StreamReader, rest: memoryview) -> None:
        self._connection = connection
        self._content = content
        self._rest = rest
        self._turn = 0  # bytes of it
        # A client that leaves while the body comes is the connection's affair.
        self.eof_received = connection.eof_received  # type: ignore[method-assign]
        self.connection_lost = connection.connection_lost  # type: ignore[method-assign]
        self.pause_writing = connection.pause_writing  # type: ignore[method-assign]
        self.resume_writing = connection.resume_writing  # type: ignore[method-assign]

    async def take(self) -> None:
        """Returns when all of it is there, or with what the connection has made of a client that leaves too early."""
        self._give_transport_to(self)
        try:
            await self._content.wait_eof()
        finally:
            if len(self._rest):  # no more is read into memory that may be another request's the next moment
                self._rest = _NOWHERE
                self._give_transport_to(self._connection)
                self._connection.leave_body()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go. None are read that are not the body's."""
        return self._rest[:STEP]

    def buffer_updated(self, nbytes: int) -> None:
        """So many have come."""
        self._rest = self._rest[nbytes:]
        self._content.total_bytes += nbytes
        self._turn += nbytes
        if not len(self._rest):
            self._rest = _NOWHERE
            self._give_transport_to(self._connection)
            self._connection.stand_between_requests()
            self._content.feed_eof()
        elif self._turn >= TURN and self._connection.transport is not None:
            self._turn = 0
            self._connection.transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        if len(self._rest) and self._connection.transport is not None:
            self._connection.transport.resume_reading()

    def _give_transport_to(self, protocol: asyncio.BaseProtocol) -> None:
        transport = self._connection.transport
        if transport is not None:
            transport.pause_reading()  # uvloop looks at what kind of protocol it has when it begins to read
            transport.set_protocol(protocol)
            transport.resume_reading()
