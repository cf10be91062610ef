"""Health: /livez and /readyz for whoever restarts and balances, /ping with TorchServe's two answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.frontend.errors import json_response
from minserve.frontend.routing import ANY_METHOD, READ, add_route

if TYPE_CHECKING:
    from aiohttp import web

    from minserve.registry.models import Registry

BROKEN = "its configuration is wrong, see the log"


class Health:
    """The health routes."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """TorchServe takes any method for /ping."""
        add_route(router, ANY_METHOD, "/ping", self.ping)
        add_route(router, READ, "/livez", self.livez)
        add_route(router, READ, "/readyz", self.readyz)

    async def livez(self, request: web.Request) -> web.Response:
        """200 as long as the event loop runs. That a model cannot be served is no reason to restart the server."""
        return json_response({"status": "live"})

    async def readyz(self, request: web.Request) -> web.Response:
        """200 while every configured model takes requests, else 503 with the reason of each that does not."""
        reasons = {
            model.spec.name: reason
            for model in self._registry.models()
            if (reason := model.supervisor.not_ready) is not None
        }
        reasons |= dict.fromkeys(self._registry.broken, BROKEN)
        if self._registry.stopping:
            return json_response({"status": "not ready", "reason": "the server is stopping", "models": reasons}, 503)
        if reasons:
            return json_response({"status": "not ready", "models": reasons}, 503)
        return json_response({"status": "ready"})

    async def ping(self, request: web.Request) -> web.Response:
        """200 while every model serves or may yet, 500 with the reasons once one has given up."""
        reasons = {
            model.spec.name: str(model.supervisor.unhealthy)
            for model in self._registry.models()
            if model.supervisor.unhealthy is not None
        }
        reasons |= dict.fromkeys(self._registry.broken, BROKEN)
        if reasons:
            return json_response({"status": "Unhealthy", "models": reasons}, 500)
        return json_response({"status": "Healthy"})
