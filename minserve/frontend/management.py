"""The management routes: TorchServe's under /models with our fields (torchserve.md 2.3, 2.4), and our own.

Those that change what is served are in `frontend.changing`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
from aiohttp import hdrs, web

from minserve.dispatch.request import Request
from minserve.errors import BadRequest, ConfigError, MinServeError, NoWorkers, Unavailable, WorkerFailed
from minserve.frontend.changing import Changing
from minserve.frontend.describing import describe_event, describe_model
from minserve.frontend.errors import json_response
from minserve.frontend.headers import ID, request_id
from minserve.frontend.kserve import takes_requests
from minserve.frontend.parameters import flag
from minserve.frontend.recording import record
from minserve.frontend.routing import READ, add_route, add_routes
from minserve.telemetry.events import SCHEMA
from minserve.wire.messages import RequestMeta

if TYPE_CHECKING:
    from minserve.config.server import ServerOptions
    from minserve.dispatch.request import Reply
    from minserve.frontend.describing import Json
    from minserve.frontend.routing import Handler, Routes
    from minserve.registry.models import Registry, ServedModel
    from minserve.telemetry.events import Event

DEFAULT_LIMIT = 100


class Management:
    """The routes under /models."""

    def __init__(self, registry: Registry, options: ServerOptions) -> None:
        self._registry = registry
        self._changing = Changing(registry, options)
        self._model_api = options.enable_model_api

    def add_routes(self, routes: Routes) -> None:
        """Every route of the management port. The words among them come first: none is a version."""
        changing = self._changing
        every: dict[str, Handler] = dict.fromkeys(READ, self.list_models)
        one: dict[str, Handler] = {**dict.fromkeys(READ, self.describe), hdrs.METH_PUT: changing.scale}
        if self._model_api:  # without them the router says 405, as TorchServe does
            every[hdrs.METH_POST] = changing.register
            one[hdrs.METH_DELETE] = changing.unregister
        add_routes(routes, "/models", every)
        add_routes(routes, "/models/{model}", one)
        for version in ("", "/{version}"):
            add_route(routes, READ, f"/models/{{model}}{version}/events", self.events)
            add_route(routes, (hdrs.METH_POST,), f"/models/{{model}}{version}/reload", self.reload)
            add_route(routes, (hdrs.METH_GET,), f"/models/{{model}}{version}/record", self.record)
        add_route(routes, (hdrs.METH_PUT,), "/models/{model}/{version}/set-default", changing.set_default)
        add_routes(routes, "/models/{model}/{version}", one)
        add_route(routes, READ, "/v1/models/{model}", self.readiness)

    async def list_models(self, request: web.Request) -> web.Response:
        """A page of models with their default versions, by name. `nextPageToken` is there while more may follow."""
        models = {model.spec.name: _url(model) for model in self._registry.models() if model.is_default}
        for name in self._registry.broken:
            models.setdefault(name, await asyncio.to_thread(self._url_of_broken, name))
        limit = _number(request, "limit", DEFAULT_LIMIT)
        if not 0 <= limit <= DEFAULT_LIMIT:
            limit = DEFAULT_LIMIT
        start = max(0, _number(request, "next_page_token", 0))
        page = [{"modelName": name, "modelUrl": models[name]} for name in sorted(models)[start : start + limit]]
        answer: Json = {"models": page}
        if start + limit <= len(models):  # TorchServe has one also where nothing follows, and then an empty page
            answer = {"nextPageToken": str(start + limit), **answer}
        return json_response(answer)

    async def describe(self, request: web.Request) -> web.Response:
        """One model version, the default one, or all. `customized=true` asks the model's handler, too."""
        name, version = request.match_info["model"], request.match_info.get("version")
        versions = self._registry.versions(name)
        at_startup = any(model.loaded_at_startup for model in versions)
        if version == "all" and versions:
            return json_response([describe_model(model, at_startup) for model in versions])
        if name in self._registry.broken and not versions:
            return json_response([{"modelName": name, "lastError": str(self._registry.broken[name]), "workers": []}])
        model = self._registry.find(name, version)
        if not flag(request.query.get("customized"), default=False):
            return json_response([describe_model(model, at_startup)])
        customized = await _customized(request, model)
        response = json_response([describe_model(model, at_startup, customized)])
        response.set_status(response.status, "")  # it is a handler's answer, in part, and those have no phrase
        return response

    async def readiness(self, request: web.Request) -> web.Response:
        """KServe's question, v1: whether the default version takes requests. TorchServe says yes while it loads."""
        model = self._registry.find(request.match_info["model"])
        return json_response({"name": model.spec.name, "ready": takes_requests(model)})

    async def events(self, request: web.Request) -> web.Response:
        """What has happened to the workers of a model version, newest last: `limit` events, by default all that are kept."""
        name = request.match_info["model"]
        events: list[Event] = []
        if name not in self._registry.broken or self._registry.versions(name):
            log = self._registry.find(name, request.match_info.get("version")).events
            limit = _number(request, "limit", 0)
            events = log.latest(limit) if limit > 0 else log.latest()
        return json_response({"schema": SCHEMA, "model": name, "events": [describe_event(event) for event in events]})

    async def reload(self, request: web.Request) -> web.Response:
        """Puts workers of the model directory as it is now in the place of those there are. Answers when that is done."""
        name, version = request.match_info["model"], request.match_info.get("version")
        try:
            await self._registry.reload(name, version)
        except ConfigError as error:
            raise BadRequest(str(error)) from None
        except WorkerFailed as error:
            raise MinServeError(f'Model "{name}" is not reloaded, its new workers do not start: {error}') from None
        return json_response({"status": f'Model "{name}" reloaded'})

    async def record(self, request: web.Request) -> web.StreamResponse:
        """Streams the batches of a worker, see `frontend.recording`."""
        return await record(
            request, self._registry.find(request.match_info["model"], request.match_info.get("version"))
        )

    def _url_of_broken(self, name: str) -> str:
        try:
            location = self._registry.location(name)
        except ConfigError:
            return ""
        return location.url or str(location.path)


def _url(model: ServedModel) -> str:
    return model.spec.url or str(model.spec.model_dir)


async def _customized(request: web.Request, model: ServedModel) -> Json:
    """What the handler says of itself, if that is a JSON object; else nothing.

    Raises:
        MinServeError: there is no worker to ask, or the handler fails.
    """
    loop = asyncio.get_running_loop()
    # A key that opens this port is no handler's affair.
    headers = tuple(header for header in request.raw_headers if header[0].lower() != b"authorization")
    id_ = request[ID] = request_id(request.headers)
    meta = RequestMeta(id_, headers, (), operation="describe")
    reply: asyncio.Future[Reply] = loop.create_future()
    try:
        answer = await model.dispatcher.submit(Request(meta, (), loop.time() + model.spec.request_timeout, reply))
    except NoWorkers:
        raise Unavailable(
            f'Model "{model.spec.name}" has no worker to serve describe request. '
            "Please use scale workers API to add workers."
        ) from None
    if answer.stream is not None:
        answer.stream.mute()
    try:
        told: object = msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _number(request: web.Request, name: str, default: int) -> int:
    """A number of the query; one that is none counts as absent, as with TorchServe."""
    try:
        return int(request.query.get(name, default))
    except ValueError:
        return default
