"""Health: /livez and /readyz for whoever restarts and balances, /ping with TorchServe's two answers.

Only default versions count: another version that is being loaded beside it, for a switch without a gap, is no reason to
take requests away from this server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.frontend.errors import json_response
from minserve.frontend.routing import ANY_METHOD, READ, add_route

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiohttp import web

    from minserve.config.server import ServerOptions
    from minserve.frontend.routing import Routes
    from minserve.registry.models import Registry, ServedModel

BROKEN = "its configuration is wrong, see the log"


class Health:
    """The health routes."""

    def __init__(self, registry: Registry, options: ServerOptions) -> None:
        self._registry = registry
        self._lenient = options.lenient
        self._tells_reasons = options.disable_token_authorization

    def add_routes(self, routes: Routes) -> None:
        """TorchServe takes any method for /ping."""
        add_route(routes, ANY_METHOD, "/ping", self.ping)
        add_route(routes.without_key(), READ, "/livez", self.livez)
        add_route(routes.without_key(), READ, "/readyz", self.readyz)

    async def livez(self, request: web.Request) -> web.Response:
        """200 as long as the event loop runs. That a model cannot be served is no reason to restart the server."""
        return json_response({"status": "live"})

    async def readyz(self, request: web.Request) -> web.Response:
        """200 while every configured model takes requests, else 503 with the reason of each that does not.

        It asks for no key, as a probe has none that lasts; where other routes do, it keeps the reasons to itself.
        """
        reasons = why_not_ready(self._registry)
        models = {"models": reasons} if self._tells_reasons else {}
        if self._registry.stopping:
            return json_response({"status": "not ready", "reason": "the server is stopping", **models}, 503)
        if reasons:
            return json_response({"status": "not ready", **models}, 503)
        return json_response({"status": "ready"})

    async def ping(self, request: web.Request) -> web.Response:
        """200 while every model serves or may yet, 500 with the reasons once one has given up.

        An archive that cannot be read makes TorchServe not unhealthy, and so it is under its command.
        """
        reasons = {
            model.spec.name: str(model.supervisor.unhealthy)
            for model in _defaults(self._registry)
            if model.supervisor.unhealthy is not None
        }
        if not self._lenient:
            reasons |= dict.fromkeys(self._registry.broken, BROKEN)
        if reasons:
            return json_response({"status": "Unhealthy", "models": reasons}, 500)
        return json_response({"status": "Healthy"})


def why_not_ready(registry: Registry) -> dict[str, str]:
    """The models whose default version takes no requests just now, each with the reason. Empty: all do."""
    reasons = {
        model.spec.name: reason for model in _defaults(registry) if (reason := model.supervisor.not_ready) is not None
    }
    return reasons | dict.fromkeys(registry.broken, BROKEN)


def _defaults(registry: Registry) -> Iterable[ServedModel]:
    return (model for model in registry.models() if model.is_default)
