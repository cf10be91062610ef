"""POST /predictions/{model} and /explanations/{model}: read, submit, await the reply, respond."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from multidict import CIMultiDict

from minserve.dispatch.request import Request
from minserve.errors import MinServeError, NoWorkers
from minserve.frontend.admission import InFlightBytes, request_timeout
from minserve.frontend.body import BodyReader, printable, split_body
from minserve.frontend.headers import ID, REQUEST_ID, UNTYPED, request_id
from minserve.frontend.routing import add_route
from minserve.frontend.streaming import stream_reply
from minserve.wire.messages import RequestMeta

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from minserve.config.server import ServerOptions
    from minserve.dispatch.request import Reply
    from minserve.frontend.admission import Share
    from minserve.frontend.routing import Routes
    from minserve.registry.models import Registry, ServedModel
    from minserve.wire.messages import Buffer, Part

METHODS = (hdrs.METH_POST, hdrs.METH_GET, hdrs.METH_PUT, hdrs.METH_DELETE, hdrs.METH_PATCH)
EXPLAIN = "explain"
BEGAN = web.RequestKey("began", float)  # when the server took up the request, on the meters' clock
_FRAMING = frozenset({"content-length", "transfer-encoding", "connection", "keep-alive", "upgrade"})


class Inference:
    """The routes under /predictions and /explanations, and how a request is carried through for every other route."""

    def __init__(self, registry: Registry, options: ServerOptions) -> None:
        self._registry = registry
        self._loop = asyncio.get_running_loop()  # kept: up to Python 3.11 to ask for it is a system call
        self._bodies = BodyReader(options)
        self._in_flight = InFlightBytes(options.max_in_flight_bytes)
        registry.metrics.in_flight = lambda: self._in_flight.used
        self._max_response_size = options.max_response_size

    def add_routes(self, routes: Routes) -> None:
        """Every method predicts, as with TorchServe."""
        for rest in ("", "/{version}", "/{version}/{rest:.*}"):
            add_route(routes, METHODS, f"/predictions/{{model}}{rest}", self.predict)
            add_route(routes, METHODS, f"/explanations/{{model}}{rest}", self.explain)

    # These two are no coroutines themselves: each one in the chain of a request costs it time.

    def predict(self, request: web.Request) -> Awaitable[web.StreamResponse]:
        """Sends one request to a model and its answer to the client."""
        match = request.match_info
        model = self._registry.find(match["model"], match.get("version") or None)
        return self.serve(request, model, "", printable(match.get("rest", "")))

    def explain(self, request: web.Request) -> Awaitable[web.StreamResponse]:
        """Sends one request to a model for an explanation, and that to the client."""
        match = request.match_info
        model = self._registry.find(match["model"], match.get("version") or None)
        return self.serve(request, model, EXPLAIN, printable(match.get("rest", "")))

    async def serve(
        self, request: web.Request, model: ServedModel, operation: str = "", url_path: str = ""
    ) -> web.StreamResponse:
        """Reads a request's body, sends it to a model and the answer to the client.

        Args:
            operation, url_path: as in `RequestMeta`.
        """
        deadline = self._loop.time() + request_timeout(request.headers, model.spec.request_timeout)
        share = self.share()
        try:
            parts, bodies = await self.receive(request, share, deadline)
            return await self.submit(request, model, parts, bodies, deadline, operation, url_path)
        finally:
            share.give_back()

    # ── what `serve` is made of ──

    def share(self) -> Share:
        """Of the bytes in flight, for one request; whoever calls this gives it back."""
        return self._in_flight.share()

    async def receive(
        self, request: web.Request, share: Share, deadline: float
    ) -> tuple[tuple[Part, ...], list[Buffer]]:
        """The parts of a request's body, see `split_body`; the bytes are counted in `share`."""
        request[BEGAN] = perf_counter()
        body = self._bodies.take(request, share)
        if body is None:
            body = await self._bodies.read(request, share, deadline)
        return split_body(body, request.headers.get(hdrs.CONTENT_TYPE, ""))

    async def submit(
        self,
        request: web.Request,
        model: ServedModel,
        parts: tuple[Part, ...],
        bodies: Sequence[Buffer],
        deadline: float,
        operation: str = "",
        url_path: str = "",
    ) -> web.StreamResponse:
        """Puts a request into a model's queue and sends the answer to the client."""
        version = request.match_info.get("version", "")
        if model.gone:  # unregistered while the body came; another version may have taken over
            model = self._registry.find(model.spec.name, version or None)
        id_ = request[ID] = request_id(request.headers)
        meta = RequestMeta(id_, request.raw_headers, parts, url_path, operation)
        reply: asyncio.Future[Reply] = self._loop.create_future()
        asked = Request(meta, bodies, deadline, reply, named=bool(version))
        try:
            answer = await model.dispatcher.submit(asked)
        except NoWorkers:
            raise NoWorkers(model.spec.name, version) from None
        replied, ours = perf_counter(), asked.entered - request[BEGAN]
        headers = headers_of(answer)
        headers[REQUEST_ID] = id_
        headers.setdefault(hdrs.CONTENT_TYPE, UNTYPED)
        if answer.stream is not None:
            model.dispatcher.meters.frontend.record(ours)
            stall_timeout = model.spec.config.minserve.stream_stall_timeout
            return await stream_reply(request, answer, answer.stream, headers, stall_timeout)
        if len(answer.body) > self._max_response_size:
            raise MinServeError(
                f'Model "{model.spec.name}": the answer has {len(answer.body)} bytes, max_response_size allows '
                f"{self._max_response_size}"
            )
        # Without a phrase of the handler's there is none, as with TorchServe.
        response = web.Response(body=answer.body, status=answer.status, reason=answer.reason, headers=headers)
        model.dispatcher.meters.frontend.record(ours + perf_counter() - replied)
        return response


def headers_of(reply: Reply) -> CIMultiDict[str]:
    """The headers that the handler has set. A length of its own would garble the next answer on the connection."""
    if not reply.headers:
        return CIMultiDict()
    return CIMultiDict((name, value) for name, value in reply.headers if name.lower() not in _FRAMING)
