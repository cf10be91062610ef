"""POST /predictions/{model} and /explanations/{model}: read, submit, await the reply, respond."""

from __future__ import annotations

import asyncio
import math
from time import perf_counter
from typing import TYPE_CHECKING, cast

from aiohttp import hdrs, web
from multidict import CIMultiDict

from minserve.dispatch.request import Request
from minserve.errors import MinServeError, NoWorkers
from minserve.frontend.admission import InFlightBytes, request_timeout
from minserve.frontend.body import BodyReader, printable, split_body, whole_type
from minserve.frontend.headers import ID, REQUEST_ID, UNTYPED, USUAL, add_usual, request_id
from minserve.frontend.passage import Carried
from minserve.frontend.routing import add_route
from minserve.frontend.streaming import stream_reply
from minserve.wire.messages import RequestMeta

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from minserve.config.server import ServerOptions
    from minserve.dispatch.request import Reply
    from minserve.frontend.admission import Share
    from minserve.frontend.lane import LaneHandler
    from minserve.frontend.models import Model, Models
    from minserve.frontend.passage import Passage
    from minserve.frontend.routing import Routes
    from minserve.wire.messages import Buffer, Part

    Complete = Callable[[tuple[Part, ...], list[Buffer]], tuple[Model, tuple[Part, ...], list[Buffer]]]

METHODS = (hdrs.METH_POST, hdrs.METH_GET, hdrs.METH_PUT, hdrs.METH_DELETE, hdrs.METH_PATCH)
EXPLAIN = "explain"
_FRAMING = frozenset({"content-length", "transfer-encoding", "connection", "keep-alive", "upgrade"})


class Inference:
    """The routes under /predictions and /explanations, and how a request is carried through for every other route."""

    def __init__(self, registry: Models, options: ServerOptions, in_flight: InFlightBytes | None = None) -> None:
        self._registry = registry
        self._loop = asyncio.get_running_loop()  # kept: up to Python 3.11 to ask for it is a system call
        self._bodies = BodyReader(options)
        self.in_flight = in_flight or InFlightBytes(options.max_in_flight_bytes)
        registry.metrics.in_flight = lambda: self.in_flight.used
        self._max_response_size = options.max_response_size

    def add_routes(self, routes: Routes) -> None:
        """Every method predicts, as with TorchServe."""
        for rest in ("", "/{version}", "/{version}/{rest:.*}"):
            add_route(routes, METHODS, f"/predictions/{{model}}{rest}", self.predict)
            add_route(routes, METHODS, f"/explanations/{{model}}{rest}", self.explain)

    # These two only hand a coroutine on: each one more in the chain would cost every request.

    def predict(self, request: web.Request) -> Awaitable[web.StreamResponse]:
        """Sends one request to a model and its answer to the client."""
        if isinstance(request.content, Carried):
            return self.deliver(request, request.content.passage)
        match = request.match_info
        model = self._registry.find(match["model"], match.get("version") or None)
        return self.serve(request, model, "", printable(match.get("rest", "")))

    def explain(self, request: web.Request) -> Awaitable[web.StreamResponse]:
        """Sends one request to a model for an explanation, and that to the client."""
        match = request.match_info
        model = self._registry.find(match["model"], match.get("version") or None)
        return self.serve(request, model, EXPLAIN, printable(match.get("rest", "")))

    async def serve(
        self,
        request: web.Request,
        model: Model | None,
        operation: str = "",
        url_path: str = "",
        complete: Complete | None = None,
    ) -> web.StreamResponse:
        """Reads a request's body, sends it to a model and the answer to the client.

        Args:
            model: None where only the body can tell.
            operation, url_path: as in `RequestMeta`.
            complete: gives the model, and the parts that it gets, from the parts of the body.
        """
        began, now, headers = perf_counter(), self._loop.time(), request.headers
        deadline = math.inf if model is None else now + request_timeout(headers, model.spec.request_timeout)
        share = self.in_flight.share()
        try:
            kind = headers.get(hdrs.CONTENT_TYPE, "")
            body: Buffer | None = self._bodies.take(request, share)
            if body is None:
                whole = complete is None and whole_type(kind) is not None
                body = await self._read(request, model, share, deadline, whole)
            parts, bodies = split_body(body, kind)
            if complete is not None:
                model, parts, bodies = complete(parts, bodies)
                deadline = now + request_timeout(headers, model.spec.request_timeout)
            assert model is not None
            version = request.match_info.get("version", "")
            if model.gone:  # unregistered while the body came; another version may have taken over
                model = self._registry.find(model.spec.name, version or None)
            if model.dispatcher.arena is not None:
                share.share_large(bodies, model.dispatcher.arena)
            id_ = request[ID] = request_id(headers)
            meta = RequestMeta(id_, request.raw_headers, parts, url_path, operation)
            asked = Request(meta, bodies, deadline, self._loop.create_future(), now, named=bool(version))
            asked.segments = share.segments
            del body, bodies  # the request has them, and whoever takes it may let go of them earlier
            try:
                reply = await model.dispatcher.submit(asked)
            except NoWorkers:
                raise NoWorkers(model.spec.name, version) from None
            return await self._answer(request, asked, reply, model, began)
        finally:
            share.give_back()

    async def deliver(self, request: web.Request, passage: Passage) -> web.StreamResponse:
        """Writes the answer, error or stream of a request that was carried to its model by `frontend.express`."""
        cast("LaneHandler", request.protocol).take_over(passage)
        asked, model = passage.asked, passage.model
        request[ID] = asked.meta.id
        request.writer.output_size = passage.sent
        try:
            try:
                reply = passage.result()
            except NoWorkers:
                raise NoWorkers(model.spec.name, passage.head.version or "") from None
            return await self._answer(request, asked, reply, model, passage.began)
        finally:
            passage.end()

    async def _answer(
        self, request: web.Request, asked: Request, reply: Reply, model: Model, began: float
    ) -> web.StreamResponse:
        replied, id_ = perf_counter(), asked.meta.id
        if reply.stream is not None:
            model.dispatcher.meters.frontend.record(asked.entered - began)
            stall_timeout = model.stream_stall_timeout
            return await stream_reply(request, reply, reply.stream, headers_of(reply, id_), stall_timeout)
        response = self._response(reply, id_, model)
        model.dispatcher.meters.frontend.record(asked.entered - began + perf_counter() - replied)
        return response

    async def _read(
        self, request: web.Request, model: Model | None, share: Share, deadline: float, whole: bool
    ) -> Buffer:
        """A body that was not there with its head. One that is a part as a `whole` may lie in the model's arena."""
        arena = model.dispatcher.arena if whole and model is not None else None
        if arena is None:
            return await self._bodies.read(request, share, deadline)
        return await self._bodies.read_into(arena, request, share, deadline)

    def _response(self, reply: Reply, id_: str, model: Model) -> web.Response:
        if len(reply.body) > self._max_response_size:
            raise MinServeError(
                f'Model "{model.spec.name}": the answer has {len(reply.body)} bytes, max_response_size allows '
                f"{self._max_response_size}"
            )
        headers = headers_of(reply, id_)
        # Without a phrase of the handler's there is none, as with TorchServe.
        if isinstance(reply.body, memoryview):
            # Taken out, for a request that was carried stays with its connection, and its reply with it.
            body, reply.body = reply.body, b""
            return _Shared(body, status=reply.status, reason=reply.reason, headers=headers)
        return web.Response(body=reply.body, status=reply.status, reason=reply.reason, headers=headers)


class _Shared(web.Response):
    """An answer from shared memory, written from there without a copy."""

    def __init__(self, body: memoryview, *, status: int, reason: str, headers: CIMultiDict[str]) -> None:
        super().__init__(status=status, reason=reason, headers=headers)
        self._body = body  # type: ignore[assignment]  # past its property, which would wrap it, and warn of a large one

    async def write_eof(self, data: bytes = b"") -> None:
        """Lets go of it, too: aiohttp keeps a connection's last answer until its next request."""
        try:
            await super().write_eof(data)
        finally:
            self._body = None


def headers_of(reply: Reply, id_: str) -> CIMultiDict[str]:
    """The usual headers and those that the handler has set. A length of its own would garble the next answer."""
    if reply.headers:
        headers = CIMultiDict((name, value) for name, value in reply.headers if name.lower() not in _FRAMING)
        add_usual(headers)
    else:
        headers = CIMultiDict(USUAL)
    headers[REQUEST_ID] = id_
    headers.setdefault(hdrs.CONTENT_TYPE, UNTYPED)
    return headers
