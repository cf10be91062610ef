"""How routes are added: every exception on them becomes JSON, every other method a 405, every other path a 404."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from aiohttp import hdrs, web

from minserve.errors import MethodNotAllowed, NotFound
from minserve.frontend.errors import errors_as_json

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
            resource.add_route(method, _answered(handler))
        if hdrs.METH_ANY not in methods:
            resource.add_route(hdrs.METH_ANY, _answered(_refuse_method))


def add_not_found(router: web.UrlDispatcher) -> None:
    """Answers for every path that has no route. Add it last."""
    router.add_route(hdrs.METH_ANY, "/{path:.*}", _answered(_refuse_path))


def _answered(handler: Handler) -> Handler:
    @functools.wraps(handler)
    async def answered(request: web.Request) -> web.StreamResponse:
        return await errors_as_json(request, handler)

    return answered


async def _refuse_method(request: web.Request) -> web.StreamResponse:
    raise MethodNotAllowed("Requested method is not allowed, please refer to API document.")


async def _refuse_path(request: web.Request) -> web.StreamResponse:
    raise NotFound("Requested resource is not found, please refer to API document.")
