"""The OpenAPI 3 description of an address, made from its routes and models.

A route declares itself by its handler's docstring: the first sentence is its summary, the rest its description. Parameters
in the path are the route's; those of the query are listed here.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING

from aiohttp import hdrs, web

import minserve
from minserve.frontend.errors import json_response
from minserve.frontend.routing import ANY_METHOD, add_route, add_routes, allowed_methods

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from minserve.frontend.routing import Handler, Route, Routes
    from minserve.registry.models import Registry

Json = dict[str, object]

PATH = "/api-description"
VERSION = "3.0.3"
_PLACEHOLDER = re.compile(r"\{(\w+)(?::[^}]*)?\}")
_TAGS = {  # by the class of the handler
    "Inference": "inference",
    "Aliases": "inference, other paths",
    "KServe": "inference, KServe",
    "Management": "models",
    "Changing": "models",
}
_PATH_TEXTS = {
    "model": "Name of a model",
    "version": "Version of a model",
    "rest": "Reaches the handler as the request header url_path",
    "file": "Name of a file",
}
_ANYTHING: Json = {"*/*": {"schema": {"type": "string", "format": "binary"}}}
_BODIES: Mapping[str, Json] = {  # by the class of the handler, or by its name
    "Inference": _ANYTHING,
    "KServe": _ANYTHING,
    "Aliases": _ANYTHING,
    "Changing.register": {"application/json": {"schema": {"type": "object"}}},
}
_SCALE = (
    ("min_worker", "integer", "Fewest workers. Default 1."),
    ("max_worker", "integer", "Most workers. Default: as min_worker."),
    ("synchronous", "boolean", "Answer once the workers are ready. Default false."),
)
_CUSTOMIZED = (("customized", "boolean", "Ask the handler for its own description, too. Default false."),)
_LIMIT_EVENTS = (("limit", "integer", "How many, the latest. Default: all that are kept."),)
_RECORD = (
    ("worker", "integer", "Number of the worker. Default 0."),
    ("bodies", "boolean", "Record the bodies, too. Default false."),
)
# Of each handler, by the name of its method: parameters of the query as name, type and text; with a star a required one.
QUERIES: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "Management.list_models": (
        ("limit", "integer", "Models on a page, at most 100. Default 100."),
        ("next_page_token", "string", "Where the page starts: nextPageToken of the page before it."),
    ),
    "Management.describe": _CUSTOMIZED,
    "Management.events": _LIMIT_EVENTS,
    "Management.record": _RECORD,
    "Changing.register": (
        (
            "*url",
            "string",
            "The archive or folder: its name in the model store, or an address that allowed_urls allows.",
        ),
        ("model_name", "string", "Default: the archive's."),
        ("handler", "string", "Default: the archive's."),
        ("runtime", "string", "Default: the archive's."),
        ("batch_size", "integer", "Default: the model's configuration's, or 1."),
        ("max_batch_delay", "integer", "Milliseconds. Default: the model's configuration's, or 100."),
        ("initial_workers", "integer", "Default: the model's configuration's."),
        ("synchronous", "boolean", "Answer once the workers are ready. Default true."),
        ("response_timeout", "integer", "Seconds. Default: the model's configuration's, or the server's."),
        ("startup_timeout", "integer", "Seconds. Default: the model's configuration's, or the server's."),
    ),
    "Changing.scale": _SCALE,
    "TokenRoute.renew": (("*type", "string", "Which key: management or inference."),),
    "MetricsRoute.show": (("name[]", "string", "Name of a sample; may be there several times. Default: all."),),
}


class Description:
    """The routes OPTIONS / and /api-description, and what OPTIONS answers on every other path.

    Args:
        name_models: whether models are named to whoever asks; not where keys are asked for.
    """

    def __init__(self, registry: Registry, title: str, name_models: bool) -> None:
        self._registry = registry
        self._title = title
        self._name_models = name_models
        self._table: list[Route] = []

    def add_routes(self, routes: Routes) -> None:
        """These ask for no key, as with TorchServe."""
        self._table = routes.table
        add_routes(routes.without_key(), "/", {hdrs.METH_OPTIONS: self.all})
        add_route(routes.without_key(), ANY_METHOD, PATH, self.all)

    async def all(self, request: web.Request) -> web.Response:
        """Describes all routes of this address, as OpenAPI."""
        return json_response(self.describe())

    async def one(self, request: web.Request) -> web.Response:
        """Describes the routes of one path, as OpenAPI.

        Raises:
            ModelNotFound, ModelVersionNotFound: the path names one that is not there.
        """
        given = dict(request.match_info)
        resource = request.match_info.route.resource
        path = resource.canonical.rstrip("/") if resource is not None else ""
        if "model" in given:
            version = given.get("version")
            self._registry.find(given["model"], None if version in (None, "", "all") else version)
        response = json_response(self.describe(path, given))
        response.headers[hdrs.ALLOW] = allowed_methods(request)
        return response

    def describe(self, path: str = "", given: Mapping[str, str] | None = None) -> Json:
        """The description of all routes, or of one path.

        Args:
            path: with its parameters in braces; "" for all.
            given: values of parameters, which then take their places in the path.
        """
        names = sorted({model.spec.name for model in self._registry.models()}) if self._name_models else []
        paths: Json = {}
        for route in self._table:
            template = _PLACEHOLDER.sub(r"{\1}", route.path)
            if path in ("", template):
                shown = _PLACEHOLDER.sub(lambda match: (given or {}).get(match[1]) or match[0], template)
                paths[shown] = _operations(route, shown, names)
        description: Json = {
            "openapi": VERSION,
            "info": {"title": self._title, "version": minserve.__version__},
            "paths": paths,
            "components": {"schemas": {"Error": _ERROR}},
        }
        if any(route.needs_key for route in self._table):
            description["components"] = {
                "schemas": {"Error": _ERROR},
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            }
        return description


def _operations(route: Route, path: str, models: list[str]) -> Json:
    """The operations of a path. Where one handler serves several methods, those of them that say more than the others."""
    operations: Json = {}
    for handler, methods in _by_handler(route.handlers).items():
        for method in _customary(methods):
            operations[method.lower()] = _operation(route, path, method, handler, models)
    return operations


def _by_handler(handlers: Mapping[str, Handler]) -> dict[Handler, list[str]]:
    methods: dict[Handler, list[str]] = {}
    for method, handler in handlers.items():
        methods.setdefault(handler, []).append(method)
    return methods


def _customary(methods: list[str]) -> Iterable[str]:
    if hdrs.METH_ANY in methods or hdrs.METH_HEAD in methods:
        return (hdrs.METH_GET,)
    return (hdrs.METH_POST,) if hdrs.METH_POST in methods else methods


def _operation(route: Route, path: str, method: str, handler: Handler, models: list[str]) -> Json:
    owner = getattr(handler, "__qualname__", "")
    text = inspect.cleandoc(handler.__doc__ or "").partition("\n\nRaises:")[0].partition("\n\nArgs:")[0]
    paragraph, _, more = text.partition("\n\n")
    summary, _, rest = " ".join(paragraph.split()).partition(". ")
    parameters: list[Json] = [_path_parameter(name, models) for name in _PLACEHOLDER.findall(path)]
    parameters += [_query_parameter(*query) for query in QUERIES.get(owner, ())]
    operation: Json = {
        "tags": [_TAGS.get(owner.partition(".")[0], "server")],
        "summary": f"{summary.rstrip('.')}.",
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
        "responses": {
            "200": {"description": "The answer"},
            "default": {
                "description": "An error",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    if rest or more:
        operation["description"] = "\n\n".join(filter(None, (rest, more)))
    if parameters:
        operation["parameters"] = parameters
    body = _BODIES.get(owner) or _BODIES.get(owner.partition(".")[0])
    if body is not None and method == hdrs.METH_POST:
        operation["requestBody"] = {"content": body}
    if route.needs_key:
        operation["security"] = [{"key": []}]
    return operation


def _path_parameter(name: str, models: list[str]) -> Json:
    schema: Json = {"type": "string"}
    if name == "model" and models:
        schema["enum"] = models
    return {"name": name, "in": "path", "required": True, "description": _PATH_TEXTS.get(name, name), "schema": schema}


def _query_parameter(name: str, kind: str, text: str) -> Json:
    return {
        "name": name.removeprefix("*"),
        "in": "query",
        "required": name.startswith("*"),
        "description": text,
        "schema": {"type": kind},
    }


_ERROR: Json = {
    "type": "object",
    "required": ["code", "type", "message"],
    "properties": {
        "code": {"type": "integer", "description": "The HTTP status"},
        "type": {"type": "string"},
        "message": {"type": "string"},
    },
}
