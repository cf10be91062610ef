"""Whether a client that has ended its direction is still there.

A client that still reads (`nc -N`, shutdown(SHUT_WR)) and one that has gone send the same FIN. What tells them apart is what
answers to a byte of ours: nothing, or a reset. A byte that HTTP/1.1 allows at any time before an answer, and that a client
who did not ask for it ignores, is the interim 100 (RFC 9110 section 15.2.1).
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

PROBE_S = 0.02
_TCP_CLOSE = 7  # include/net/tcp_states.h


def probe(transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
    """Sends a client such a byte, and soon ends the connection if it has gone. Only before its answer, and by HTTP/1.1."""
    transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    loop.call_later(PROBE_S, abort_if_gone, transport)


def abort_if_gone(transport: asyncio.Transport) -> None:
    """Ends a connection that was reset. Nobody reads one whose end has come, so the loop does not notice it."""
    if transport.is_closing():
        return
    client = transport.get_extra_info("socket")
    if client.family == socket.AF_UNIX:
        return  # the probe itself has failed then
    if client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
        transport.abort()
