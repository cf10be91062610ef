"""KServe's paths for predictions and readiness, v1 and v2, on the inference port.

A request is neither checked nor changed on its way: the archive's envelope (`kserve`, `kservev2`) takes it apart, as with
TorchServe. Readiness is what it says, where TorchServe always says yes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import minserve
from minserve.frontend.errors import json_response
from minserve.frontend.health import why_not_ready
from minserve.frontend.inference import EXPLAIN, METHODS
from minserve.frontend.routing import ANY_METHOD, READ, add_route

if TYPE_CHECKING:
    from aiohttp import web

    from minserve.frontend.inference import Inference
    from minserve.frontend.models import Model, Models
    from minserve.frontend.routing import Routes
    from minserve.registry.models import Registry, ServedModel

V2_MODELS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")


class KServePredictions:
    """The routes under /v1 and /v2 that ask models."""

    def __init__(self, registry: Models, inference: Inference) -> None:
        self._registry = registry
        self._inference = inference

    def add_routes(self, routes: Routes) -> None:
        """v1 knows no versions. TorchServe answers v2 paths with a version by 501; here they name one."""
        add_route(routes, METHODS, "/v1/models/{model}:predict", self.predict)
        add_route(routes, METHODS, "/v1/models/{model}:explain", self.explain)
        for model in V2_MODELS:
            add_route(routes, METHODS, f"{model}/infer", self.predict)
            add_route(routes, METHODS, f"{model}/explain", self.explain)

    async def predict(self, request: web.Request) -> web.StreamResponse:
        """Sends one request to a model and its answer to the client."""
        return await self._inference.serve(request, self._model(request))

    async def explain(self, request: web.Request) -> web.StreamResponse:
        """Sends one request to a model for an explanation, and that to the client."""
        return await self._inference.serve(request, self._model(request), EXPLAIN)

    def _model(self, request: web.Request) -> Model:
        match = request.match_info
        return self._registry.find(match["model"], match.get("version"))


class KServe:
    """Every route under /v1 and /v2: those that ask models, and those that tell the server's state."""

    def __init__(self, registry: Registry, inference: Inference) -> None:
        self._registry = registry
        self._inference = inference

    def add_routes(self, routes: Routes) -> None:
        """Adds them all."""
        KServePredictions(self._registry, self._inference).add_routes(routes)
        for model in V2_MODELS:
            add_route(routes, READ, f"{model}/ready", self.model_ready)
        add_route(routes, ANY_METHOD, "/v2", self.metadata)
        add_route(routes, ANY_METHOD, "/v2/health/live", self.live)
        add_route(routes, ANY_METHOD, "/v2/health/ready", self.ready)

    async def model_ready(self, request: web.Request) -> web.Response:
        """200 while a model takes requests, else 503."""
        match = request.match_info
        model = self._registry.find(match["model"], match.get("version"))
        ready = takes_requests(model)
        return json_response({"name": model.spec.name, "ready": ready}, 200 if ready else 503)

    async def metadata(self, request: web.Request) -> web.Response:
        """Name and version of the server. `extenstion` is what TorchServe's key is called."""
        names = ["kserve", "kubeflow"]
        version = minserve.__version__
        return json_response({"name": "minserve", "version": version, "extensions": names, "extenstion": names})

    async def live(self, request: web.Request) -> web.Response:
        """200 as long as the server answers at all."""
        return json_response({"live": True})

    async def ready(self, request: web.Request) -> web.Response:
        """200 while every model takes requests and the server does not stop, else 503."""
        ready = not self._registry.stopping and not why_not_ready(self._registry)
        return json_response({"ready": ready}, 200 if ready else 503)


def takes_requests(model: ServedModel) -> bool:
    """Whether a model version has a worker that takes batches. One that has none, because nobody asked for any, has not."""
    return any(report.serving for report in model.supervisor.report()) and model.supervisor.not_ready is None
