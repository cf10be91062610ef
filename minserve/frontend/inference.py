"""POST /predictions/{model}: read, submit, await the reply, respond."""

from __future__ import annotations

import asyncio
import random
import re
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from multidict import CIMultiDict

from minserve.dispatch.request import Request
from minserve.frontend.body import printable, read_parts
from minserve.frontend.routing import add_route
from minserve.frontend.streaming import stream_reply
from minserve.wire.messages import RequestMeta

if TYPE_CHECKING:
    from minserve.dispatch.request import Reply
    from minserve.registry.models import Registry

REQUEST_ID = "x-request-id"
METHODS = (hdrs.METH_POST, hdrs.METH_GET, hdrs.METH_PUT, hdrs.METH_DELETE, hdrs.METH_PATCH)
_ID = web.RequestKey("request_id", str)
_UNTYPED = ""  # stands for Content-Type on an answer that shall have none: aiohttp sets its own where it is missing
_FRAMING = frozenset({"content-length", "transfer-encoding", "connection", "keep-alive", "upgrade"})
_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Inference:
    """The routes under /predictions."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Every method predicts, as with TorchServe."""
        for rest in ("", "/{version}", "/{version}/{rest:.*}"):
            add_route(router, METHODS, f"/predictions/{{model}}{rest}", self.predict)

    async def predict(self, request: web.Request) -> web.StreamResponse:
        """Sends one request to a model and its answer to the client."""
        match = request.match_info
        model = self._registry.find(match["model"], match.get("version") or None)
        parts, bodies = await read_parts(request)
        loop = asyncio.get_running_loop()
        request[_ID] = request_id(request)
        meta = RequestMeta(request[_ID], request.raw_headers, parts, printable(match.get("rest", "")))
        prediction = Request(meta, bodies, loop.time() + model.spec.request_timeout, loop.create_future())
        reply = await model.dispatcher.submit(prediction)
        headers = headers_of(reply)
        headers[REQUEST_ID] = meta.id
        headers.setdefault(hdrs.CONTENT_TYPE, _UNTYPED)
        if reply.stream is not None:
            return await stream_reply(request, reply, reply.stream, headers)
        return web.Response(body=reply.body, status=reply.status, reason=reply.reason or None, headers=headers)


def headers_of(reply: Reply) -> CIMultiDict[str]:
    """The headers that the handler has set. A length of its own would garble the next answer on the connection."""
    if not reply.headers:
        return CIMultiDict()
    return CIMultiDict((name, value) for name, value in reply.headers if name.lower() not in _FRAMING)


def request_id(request: web.Request) -> str:
    """The client's x-request-id where it is fit to be logged, else a fresh one."""
    given = request.headers.get(REQUEST_ID)
    return given if given and _CLIENT_ID.fullmatch(given) else _fresh_id()


def _fresh_id() -> str:
    """A random UUID, as TorchServe gives. `uuid.uuid4` takes four times as long, and this one guards nothing."""
    digits = f"{random.getrandbits(128):032x}"
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


async def finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Called for each answer before its headers go out."""
    headers = response.headers
    headers[hdrs.SERVER] = "minserve"
    if REQUEST_ID not in headers:  # an error's answer has the id that the handler has seen, if it came that far
        headers[REQUEST_ID] = request.get(_ID) or request_id(request)
    if headers.get(hdrs.CONTENT_TYPE) == _UNTYPED:
        del headers[hdrs.CONTENT_TYPE]
