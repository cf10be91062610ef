"""One line for each answer, in TorchServe's form: `/127.0.0.1:42126 "POST /predictions/m HTTP/1.1" 200 3`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from aiohttp.abc import AbstractAccessLogger

if TYPE_CHECKING:
    import asyncio

    from aiohttp import HttpVersion, web

ACCESS = logging.getLogger("minserve.access")


class AccessLogger(AbstractAccessLogger):
    """Writes the line: the client's address, the request line, the status, the milliseconds."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Called by aiohttp when the last byte of an answer was handed over. `time` is in seconds."""
        self.tell(request.transport, request.method, request.raw_path, request.version, response.status, time)

    def tell(
        self,
        transport: asyncio.BaseTransport | None,
        method: str,
        path: str,
        version: HttpVersion,
        status: int,
        seconds: float,
    ) -> None:
        """Writes the line of an answer."""
        peer = transport.get_extra_info("peername") if transport is not None else None
        client = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unix"
        line = f'/{client} "{method} {ascii(path)[1:-1]} HTTP/{version.major}.{version.minor}"'
        self.logger.info("%s %d %d", line, status, int(seconds * 1000))
