"""POST /predictions/{model}: read, submit, await the reply, respond."""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from multidict import CIMultiDict

from minserve.dispatch.request import Request
from minserve.frontend.body import printable, read_parts
from minserve.frontend.streaming import stream_reply
from minserve.wire.messages import RequestMeta

if TYPE_CHECKING:
    from minserve.dispatch.request import Reply
    from minserve.registry.models import Registry

REQUEST_ID = "x-request-id"
_ID = web.RequestKey("request_id", str)
_UNTYPED = web.RequestKey("untyped", bool)  # the handler has given its answer no Content-Type
_FRAMING = frozenset({"content-length", "transfer-encoding", "connection", "keep-alive", "upgrade"})
_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Inference:
    """The routes under /predictions."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Every method predicts, as with TorchServe."""
        for path in (
            "/predictions/{model}",
            "/predictions/{model}/{version}",
            "/predictions/{model}/{version}/{rest:.*}",
        ):
            for method in (hdrs.METH_POST, hdrs.METH_GET, hdrs.METH_PUT, hdrs.METH_DELETE, hdrs.METH_PATCH):
                router.add_route(method, path, self.predict)

    async def predict(self, request: web.Request) -> web.StreamResponse:
        """Sends one request to a model and its answer to the client."""
        match = request.match_info
        model = self._registry.find(match["model"], match.get("version") or None)
        parts, bodies = await read_parts(request)
        loop = asyncio.get_running_loop()
        meta = RequestMeta(request_id(request), request.raw_headers, parts, printable(match.get("rest", "")))
        prediction = Request(meta, bodies, loop.time() + model.spec.request_timeout, loop.create_future())
        reply = await model.dispatcher.submit(prediction)
        request[_UNTYPED] = not any(name.lower() == "content-type" for name, _ in reply.headers)
        if reply.stream is not None:
            return await stream_reply(request, reply, reply.stream, headers_of(reply))
        return web.Response(
            body=reply.body, status=reply.status, reason=reply.reason or None, headers=headers_of(reply)
        )


def headers_of(reply: Reply) -> CIMultiDict[str]:
    """The headers that the handler has set. A length of its own would garble the next answer on the connection."""
    return CIMultiDict((name, value) for name, value in reply.headers if name.lower() not in _FRAMING)


def request_id(request: web.Request) -> str:
    """The client's x-request-id where it is fit to be logged, else a fresh one. The same for the whole request."""
    known = request.get(_ID)
    if known is None:
        given = request.headers.get(REQUEST_ID)
        known = given if given and _CLIENT_ID.fullmatch(given) else str(uuid.uuid4())
        request[_ID] = known
    return known


async def finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Called for each answer before its headers go out."""
    headers = response.headers
    headers[REQUEST_ID] = request_id(request)
    headers[hdrs.SERVER] = "minserve"
    if request.get(_UNTYPED):
        headers.popall(hdrs.CONTENT_TYPE, None)  # aiohttp's default; TorchServe sends none
