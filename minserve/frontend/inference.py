"""POST /predictions/{model}: read, submit, await the reply, respond."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from multidict import CIMultiDict

from minserve.dispatch.request import Request
from minserve.frontend.admission import InFlightBytes, request_timeout
from minserve.frontend.body import BodyReader, printable, split_body
from minserve.frontend.headers import ID, REQUEST_ID, UNTYPED, request_id
from minserve.frontend.routing import add_route
from minserve.frontend.streaming import stream_reply
from minserve.wire.messages import RequestMeta

if TYPE_CHECKING:
    from minserve.config.server import ServerOptions
    from minserve.dispatch.request import Reply
    from minserve.registry.models import Registry, ServedModel

METHODS = (hdrs.METH_POST, hdrs.METH_GET, hdrs.METH_PUT, hdrs.METH_DELETE, hdrs.METH_PATCH)
_FRAMING = frozenset({"content-length", "transfer-encoding", "connection", "keep-alive", "upgrade"})


class Inference:
    """The routes under /predictions."""

    def __init__(self, registry: Registry, options: ServerOptions) -> None:
        self._registry = registry
        self._bodies = BodyReader(options)
        self._in_flight = InFlightBytes(options.max_in_flight_bytes)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Every method predicts, as with TorchServe."""
        for rest in ("", "/{version}", "/{version}/{rest:.*}"):
            add_route(router, METHODS, f"/predictions/{{model}}{rest}", self.predict)

    async def predict(self, request: web.Request) -> web.StreamResponse:
        """Sends one request to a model and its answer to the client."""
        match, headers = request.match_info, request.headers
        model = self._registry.find(match["model"], match.get("version") or None)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request_timeout(headers, model.spec.request_timeout)
        share = self._in_flight.share()
        try:
            body = self._bodies.take(request, share)
            if body is None:
                body = await self._bodies.read(request, share, deadline)
            parts, bodies = split_body(body, headers.get(hdrs.CONTENT_TYPE, ""))
            request[ID] = request_id(headers)
            meta = RequestMeta(request[ID], request.raw_headers, parts, printable(match.get("rest", "")))
            reply = await model.dispatcher.submit(Request(meta, bodies, deadline, loop.create_future()))
            return await _respond(request, reply, meta.id, model)
        finally:
            share.give_back()


async def _respond(request: web.Request, reply: Reply, id_: str, model: ServedModel) -> web.StreamResponse:
    headers = headers_of(reply)
    headers[REQUEST_ID] = id_
    headers.setdefault(hdrs.CONTENT_TYPE, UNTYPED)
    if reply.stream is not None:
        stall_timeout = model.spec.config.minserve.stream_stall_timeout
        return await stream_reply(request, reply, reply.stream, headers, stall_timeout)
    return web.Response(body=reply.body, status=reply.status, reason=reply.reason or None, headers=headers)


def headers_of(reply: Reply) -> CIMultiDict[str]:
    """The headers that the handler has set. A length of its own would garble the next answer on the connection."""
    if not reply.headers:
        return CIMultiDict()
    return CIMultiDict((name, value) for name, value in reply.headers if name.lower() not in _FRAMING)
