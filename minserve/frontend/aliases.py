"""Other paths for a prediction: those of SageMaker's containers, and TorchServe's oldest.

On these, and on no others, what the query says reaches the handler too, each key as one more field of its input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.errors import BadRequest
from minserve.frontend.body import query_fields
from minserve.frontend.inference import METHODS
from minserve.frontend.routing import add_route
from minserve.wire.messages import Part

if TYPE_CHECKING:
    from aiohttp import web

    from minserve.frontend.inference import Inference
    from minserve.frontend.models import Model, Models
    from minserve.frontend.routing import Routes
    from minserve.wire.messages import Buffer

Parts = tuple[tuple[Part, ...], list["Buffer"]]
MODEL_NAME = "model_name"


class Aliases:
    """The routes /invocations, /models/{model}/invoke, /{model}/predict and /{model}/{version}/predict."""

    def __init__(self, registry: Models, inference: Inference) -> None:
        self._registry = registry
        self._inference = inference

    def add_routes(self, routes: Routes) -> None:
        """Add them late: two of them begin with any word."""
        add_route(routes, METHODS, "/invocations", self.invoke)
        add_route(routes, METHODS, "/models/{model}/invoke", self.predict)
        add_route(routes, METHODS, "/{model}/predict", self.predict)
        add_route(routes, METHODS, "/{model}/{version}/predict", self.predict)

    async def predict(self, request: web.Request) -> web.StreamResponse:
        """Sends one request, with what its query says, to a model and the answer to the client."""
        match = request.match_info
        model = self._registry.find(match["model"], match.get("version"))
        return await self._serve(request, model, query_fields(request.rel_url.raw_query_string))

    async def invoke(self, request: web.Request) -> web.StreamResponse:
        """Sends one request to the model that its query or its form names, or to the only one there is."""
        fields = query_fields(request.rel_url.raw_query_string)
        name = fields.get(MODEL_NAME)
        return await self._serve(request, None if name is None else self._named(name), fields)

    async def _serve(self, request: web.Request, model: Model | None, fields: dict[str, bytes]) -> web.StreamResponse:
        def complete(parts: tuple[Part, ...], bodies: list[Buffer]) -> tuple[Model, tuple[Part, ...], list[Buffer]]:
            return model or self._named_in(parts, bodies), *_with_fields(parts, bodies, fields)

        return await self._inference.serve(request, model, complete=complete)

    def _named_in(self, parts: tuple[Part, ...], bodies: list[Buffer]) -> Model:
        for part, body in zip(parts, bodies, strict=True):
            if part.name == MODEL_NAME:
                return self._named(bytes(body))
        only = self._registry.only()
        if only is None:
            raise no_model_named()
        return only

    def _named(self, name: bytes) -> Model:
        return self._registry.find(name.decode("utf-8", "replace"))


def no_model_named() -> BadRequest:
    """The error of a request that names no model where there are several, or none."""
    return BadRequest(f"Parameter {MODEL_NAME} is required.")


def _with_fields(parts: tuple[Part, ...], bodies: list[Buffer], fields: dict[str, bytes]) -> Parts:
    """The query's fields in front of the body's; of two with one name the body's stands, as with TorchServe."""
    in_body = {part.name for part in parts}
    added = {name: value for name, value in fields.items() if name not in in_body}
    front = tuple(Part(name, "", len(value)) for name, value in added.items())
    return front + parts, [*added.values(), *bodies]
