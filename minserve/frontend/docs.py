"""/docs: Swagger UI over this server's own description. Nothing is fetched from anywhere else.

Its pages hold nothing but what the package has, so they ask for no key; what they call does, and their button
"Authorize" takes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import hdrs, web

from minserve.errors import NotFound
from minserve.frontend.errors import NO_SUCH_PATH
from minserve.frontend.openapi import PATH
from minserve.frontend.routing import READ, add_route

if TYPE_CHECKING:
    from minserve.frontend.routing import Routes

JAVASCRIPT = "text/javascript"
ASSETS = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": JAVASCRIPT,
    "favicon-32x32.png": "image/png",
}
SCRIPT = "start.js"
_HEADERS = {
    # Styles: Swagger UI writes some into its elements.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>minserve</title>
<link rel="icon" href="/docs/favicon-32x32.png">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START = f"""SwaggerUIBundle({{
  url: "{PATH}",
  dom_id: "#swagger-ui",
  validatorUrl: null,
  deepLinking: true,
}});
"""


class Docs:
    """The routes under /docs."""

    def add_routes(self, routes: Routes) -> None:
        """The page and its files."""
        add_route(routes.without_key(), READ, "/docs", self.page)
        add_route(routes.without_key(), READ, "/docs/{file}", self.file)

    async def page(self, request: web.Request) -> web.Response:
        """Shows this description in a browser, where its requests can be tried."""
        return web.Response(text=_PAGE, content_type="text/html", headers=_HEADERS)

    async def file(self, request: web.Request) -> web.StreamResponse:
        """One of the files of that page."""
        name = request.match_info["file"]
        if name == SCRIPT:
            return web.Response(text=_START, content_type=JAVASCRIPT, headers=_HEADERS)
        if name not in ASSETS:
            raise NotFound(NO_SUCH_PATH)
        from swagger_ui_bundle import swagger_ui_path  # only for those who look at it

        return web.FileResponse(swagger_ui_path / name, headers={**_HEADERS, hdrs.CONTENT_TYPE: ASSETS[name]})
