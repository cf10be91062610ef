"""The aiohttp applications, one for each address, what stands in front of their routes, and what runs them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import http_parser, web

from minserve.config.addresses import Address, Role, parse_address
from minserve.errors import StartupError
from minserve.frontend.aliases import Aliases
from minserve.frontend.auth import KEY_FILE, Keys, Kind, TokenRoute
from minserve.frontend.connections import SHUTDOWN_TIMEOUT_S, Connections
from minserve.frontend.cors import Cors
from minserve.frontend.docs import Docs
from minserve.frontend.express import EXPRESS, Express
from minserve.frontend.guard import Guard
from minserve.frontend.headers import finish_headers
from minserve.frontend.health import Health
from minserve.frontend.inference import Inference
from minserve.frontend.kserve import KServe
from minserve.frontend.management import Management
from minserve.frontend.metrics import METRICS, MetricsRoute
from minserve.frontend.openapi import Description
from minserve.frontend.routing import Routes, add_not_found

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from minserve.config.server import ServerOptions
    from minserve.frontend.routing import Check
    from minserve.registry.models import Registry
    from minserve.telemetry.metrics import Metrics


_TITLES = {
    Role.INFERENCE: "minserve: inference",
    Role.MANAGEMENT: "minserve: management",
    Role.METRICS: "minserve: metrics",
}


def make_keys(options: ServerOptions) -> Keys | None:
    """The keys of a server, in a fresh key file of the current folder; None: it asks for none.

    Raises:
        StartupError: the file cannot be written.
    """
    if options.disable_token_authorization:
        return None
    return Keys(Path.cwd() / KEY_FILE, options.token_expiration_min)


def inference_app(registry: Registry, options: ServerOptions, keys: Keys | None = None) -> web.Application:
    """What listens on the inference port."""
    app, routes = _application(registry, options, keys, Role.INFERENCE)
    _add_inference(app, routes, registry, options, keys)
    add_not_found(routes)
    return app


def management_app(registry: Registry, options: ServerOptions, keys: Keys | None = None) -> web.Application:
    """What listens on the management port."""
    app, routes = _application(registry, options, keys, Role.MANAGEMENT)
    Health(registry, options).add_routes(routes)
    _add_management(routes, registry, options, keys)
    add_not_found(routes)
    return app


def metrics_app(registry: Registry, options: ServerOptions) -> web.Application:
    """What listens on the metrics port. It asks for no key, as with TorchServe."""
    app, routes = _application(registry, options, None, Role.METRICS)
    MetricsRoute(registry).add_routes(routes)
    add_not_found(routes)
    return app


def combined_app(registry: Registry, options: ServerOptions, keys: Keys | None = None) -> web.Application:
    """What listens on the one port of inference and management, with the metrics beside them, as TorchServe has it.

    Each route asks for the key of its own kind; TorchServe asks management calls for both in one header.
    """
    app, routes = _application(registry, options, keys, Role.INFERENCE)
    management = routes.behind(
        keys.require(Kind.MANAGEMENT) if keys is not None else None, *_guard(options, Role.MANAGEMENT)
    )
    if options.enable_metrics_api:
        MetricsRoute(registry).add_routes(management)
    # First, as with TorchServe: /models/{model}/invoke is no model's version.
    _add_inference(app, routes, registry, options, keys)
    _add_management(management, registry, options, keys)
    add_not_found(routes)
    return app


def _add_inference(
    app: web.Application, routes: Routes, registry: Registry, options: ServerOptions, keys: Keys | None
) -> None:
    Health(registry, options).add_routes(routes)
    inference = Inference(registry, options)
    for these in (inference, KServe(registry, inference), Aliases(registry, inference)):
        these.add_routes(routes)
    if not Cors(options).on:  # what it adds to answers depends on each request
        key = functools.partial(keys.good, Kind.INFERENCE) if keys is not None else None
        app[EXPRESS] = Express(registry, options, inference.in_flight, key)


def _add_management(routes: Routes, registry: Registry, options: ServerOptions, keys: Keys | None) -> None:
    Management(registry, options).add_routes(routes)
    Docs().add_routes(routes)
    if keys is not None:
        TokenRoute(keys).add_routes(routes)


def _application(
    registry: Registry, options: ServerOptions, keys: Keys | None, role: Role
) -> tuple[web.Application, Routes]:
    """An application that describes itself, and where its routes are added."""
    app = web.Application(client_max_size=options.max_request_size)
    app[METRICS] = registry.metrics
    app.on_response_prepare.append(_finish(registry.metrics))
    cors = Cors(options)
    if cors.on:
        app.on_response_prepare.append(cors.add_headers)
    description = Description(registry, _TITLES[role], name_models=keys is None)
    checks = () if role is Role.INFERENCE else _guard(options, role)
    if cors.on:
        checks = (*checks, cors.preflight)
    key = keys.require(Kind.INFERENCE if role is Role.INFERENCE else Kind.MANAGEMENT) if keys is not None else None
    routes = Routes(app.router, checks, key, description.one)
    description.add_routes(routes)
    return app, routes


def _finish(metrics: Metrics) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """What is done to every answer of an application as its head goes out."""

    async def finish(request: web.Request, response: web.StreamResponse) -> None:
        finish_headers(request, response)
        metrics.answered(response.status)

    return finish


def _guard(options: ServerOptions, role: Role) -> tuple[Check, ...]:
    """The check of hosts and origins. No browser reaches a unix socket."""
    text = options.management_address if role is Role.MANAGEMENT else options.metrics_address
    address = parse_address(text, role) if text else Address(options.host)
    return () if address.path else (Guard(address.host, options.allowed_hosts, Cors(options)),)


def runner(app: web.Application, options: ServerOptions) -> web.AppRunner:
    """Runs an application, with our own connections in place of aiohttp's."""
    return _Runner(app, options)


class _Runner(web.AppRunner):
    __slots__ = ("_options",)

    def __init__(self, app: web.Application, options: ServerOptions) -> None:
        super().__init__(app, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
        self._options = options

    async def _make_server(self) -> web.Server:
        return Connections(await super()._make_server(), self._options, self.app.get(METRICS), self.app.get(EXPRESS))


def require_c_parser() -> None:
    """The pure Python parser is slower by an order of magnitude, and not the one that was tested.

    Raises:
        StartupError: aiohttp was installed without its C extension.
    """
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise StartupError("aiohttp runs without its C parser; reinstall it from a wheel for this platform")
