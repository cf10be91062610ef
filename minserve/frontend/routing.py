"""How routes are added: every exception on them becomes JSON, every other method a 405, every other path a 404."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, hdrs, web

from minserve.errors import MethodNotAllowed, NotFound
from minserve.frontend.errors import NO_SUCH_PATH, errors_as_json, refusal, refuse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

ANY_METHOD = (hdrs.METH_ANY,)
READ = (hdrs.METH_GET, hdrs.METH_HEAD)


def add_route(router: web.UrlDispatcher, methods: Sequence[str], path: str, handler: Handler) -> None:
    """Adds a route.

    Each handler is wrapped by itself: a middleware would cost every prediction two more coroutines of aiohttp's.
    """
    for spelling in (path,) if path.endswith(":.*}") else (path, f"{path}/"):  # TorchServe ignores a slash at the end
        resource = router.add_resource(spelling)
        for method in methods:
            resource.add_route(method, _answered(handler), expect_handler=_expect)
        if hdrs.METH_ANY not in methods:
            resource.add_route(hdrs.METH_ANY, _answered(_refuse_method), expect_handler=_expect)


def add_not_found(router: web.UrlDispatcher) -> None:
    """Answers for every path that has no route. Add it last."""
    router.add_route(hdrs.METH_ANY, "/{path:.*}", _answered(_refuse_path), expect_handler=_expect)
    asterisk = _Asterisk()
    asterisk.add_route(hdrs.METH_ANY, _answered(_refuse_path), expect_handler=_expect)
    router.register_resource(asterisk)


class _Asterisk(web.PlainResource):
    """The target of `OPTIONS *`, the one that is no path."""

    def __init__(self) -> None:
        super().__init__("")
        self._path = "*"


def _answered(handler: Handler) -> Handler:
    @functools.wraps(handler)
    async def answered(request: web.Request) -> web.StreamResponse:
        return await errors_as_json(request, handler)

    return answered


async def _expect(request: web.Request) -> web.StreamResponse | None:
    """Judges an Expect header. The 100 that it asks for is sent when the body is read, if it ever is."""
    expected = request.headers[hdrs.EXPECT]
    if request.version >= HttpVersion11 and expected.lower() != "100-continue":
        return refuse(request, refusal(417, f"Expect: found {expected[:100]!a}, allowed: 100-continue"))
    return None


async def _refuse_method(request: web.Request) -> web.StreamResponse:
    response = refuse(request, MethodNotAllowed("Requested method is not allowed, please refer to API document."))
    resource = request.match_info.route.resource
    methods = {route.method for route in resource or ()} - {hdrs.METH_ANY}
    response.headers[hdrs.ALLOW] = ", ".join(sorted(methods))
    return response


async def _refuse_path(request: web.Request) -> web.StreamResponse:
    return refuse(request, NotFound(NO_SUCH_PATH))
