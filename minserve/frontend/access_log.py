"""One line for each answer, in TorchServe's form: `/127.0.0.1:42126 "POST /predictions/m HTTP/1.1" 200 3`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from aiohttp.abc import AbstractAccessLogger

if TYPE_CHECKING:
    from aiohttp import web

ACCESS = logging.getLogger("minserve.access")


class AccessLogger(AbstractAccessLogger):
    """Writes the line: the client's address, the request line, the status, the milliseconds."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Called by aiohttp when the last byte of an answer was handed over. `time` is in seconds."""
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        client = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unix"
        version = f"{request.version.major}.{request.version.minor}"
        line = f'/{client} "{request.method} {ascii(request.raw_path)[1:-1]} HTTP/{version}"'
        self.logger.info("%s %d %d", line, response.status, int(time * 1000))
