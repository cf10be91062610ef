"""Connections that a frontend process hands over to the server, for requests that are no predictions."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import web


class Handover:
    """Takes them over.

    Args:
        source: a socket whose messages each bring one end of a connection.
        server: makes a protocol for each.
    """

    def __init__(self, source: socket.socket, server: web.Server) -> None:
        self._source = source
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[object]] = set()
        source.setblocking(False)
        self._loop.add_reader(source, self._take)

    def close(self) -> None:
        """Takes none any more."""
        if self._source.fileno() >= 0:
            self._loop.remove_reader(self._source)
            self._source.close()

    def _take(self) -> None:
        try:
            _, descriptors, _, _ = socket.recv_fds(self._source, 1, 1)
        except BlockingIOError:
            return
        if not descriptors:  # the process has ended
            self._loop.remove_reader(self._source)
            return
        connection = socket.socket(fileno=descriptors[0])
        connection.setblocking(False)
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._server, connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
