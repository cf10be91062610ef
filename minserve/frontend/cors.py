"""Cross-origin requests of browsers (the Fetch standard, "CORS protocol"): nothing unless the server's options ask for it.

As with TorchServe every answer then carries what is configured. Unlike there a preflight, which a browser sends without the
key, is answered before a key is asked for; and of several origins the one that asks is named, as browsers take one only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import hdrs, web

if TYPE_CHECKING:
    from minserve.config.server import ServerOptions

ANY = "*"


class Cors:
    """What pages of other origins may do."""

    def __init__(self, options: ServerOptions) -> None:
        self._origins = [origin.strip() for origin in options.cors_allowed_origin.split(",") if origin.strip()]
        self._fixed = {
            name: value
            for name, value in (
                (hdrs.ACCESS_CONTROL_ALLOW_METHODS, options.cors_allowed_methods),
                (hdrs.ACCESS_CONTROL_ALLOW_HEADERS, options.cors_allowed_headers),
            )
            if value
        }

    @property
    def on(self) -> bool:
        """Whether anything is configured."""
        return bool(self._origins or self._fixed)

    def allows(self, origin: str) -> bool:
        """Whether pages of an origin may call the server."""
        return ANY in self._origins or origin in self._origins

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser that asks whether it may send a request; None: this is no such question."""
        if (
            request.method == hdrs.METH_OPTIONS
            and self._origins
            and hdrs.ORIGIN in request.headers
            and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
        ):
            return web.Response(status=204)  # `add_headers` does the rest
        return None

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Called for each answer before its headers go out. What a handler has set itself stays."""
        headers = response.headers
        if self._origins and hdrs.ACCESS_CONTROL_ALLOW_ORIGIN not in headers:
            origin = self._origins[0]
            if len(self._origins) > 1:
                headers.add(hdrs.VARY, hdrs.ORIGIN)
                asking = request.headers.get(hdrs.ORIGIN, "")
                origin = asking if asking in self._origins else origin
            headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = ANY if ANY in self._origins else origin
        for name, value in self._fixed.items():
            headers.setdefault(name, value)
