"""GET /ping: TorchServe's two answers, with the reasons beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.frontend.errors import json_response
from minserve.frontend.routing import ANY_METHOD, add_route

if TYPE_CHECKING:
    from aiohttp import web

    from minserve.registry.models import Registry


class Health:
    """The health routes."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """TorchServe takes any method here."""
        add_route(router, ANY_METHOD, "/ping", self.ping)

    async def ping(self, request: web.Request) -> web.Response:
        """200 while every model serves or may yet, 500 with the reasons once one has given up."""
        reasons = {
            model.spec.name: str(model.supervisor.unhealthy)
            for model in self._registry.models()
            if model.supervisor.unhealthy is not None
        }
        reasons |= dict.fromkeys(self._registry.broken, "its configuration is wrong, see the log")
        if reasons:
            return json_response({"status": "Unhealthy", "models": reasons}, 500)
        return json_response({"status": "Healthy"})
