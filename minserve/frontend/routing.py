"""How routes are added: what stands in front of each of them, and how all of them answer what they do not serve.

Every exception on a route becomes JSON, every other method a 405, every other path a 404. Checks of where a request comes
from and of its key are part of adding a route, so that none can be without.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, hdrs, web

from minserve.errors import MethodNotAllowed, MinServeError, NotFound
from minserve.frontend.errors import NO_SUCH_PATH, errors_as_json, refusal, refuse

if TYPE_CHECKING:
    from collections.abc import Sequence

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Check = Callable[[web.Request], web.StreamResponse | None]
"""Looks at a request before its handler: None lets it pass, an answer takes the handler's place, an error refuses it."""

ANY_METHOD = (hdrs.METH_ANY,)
READ = (hdrs.METH_GET, hdrs.METH_HEAD)


@dataclass(frozen=True, slots=True)
class Route:
    """A path, as aiohttp reads it, with its handler for each method."""

    path: str
    handlers: Mapping[str, Handler]
    needs_key: bool


@dataclass(frozen=True, slots=True)
class Routes:
    """The routes of an application, or those of them that stand behind the same checks.

    Attributes:
        checks: what every request has to pass, in this order.
        key: the check of a request's key, after the others; None: no key is asked for.
        describe: answers OPTIONS on each path that says nothing of its own about that method.
        otherwise: answers every other method that a path says nothing about; None: with a 405.
        table: every route that was added, whatever stands in front of it.
    """

    router: web.UrlDispatcher
    checks: tuple[Check, ...] = ()
    key: Check | None = None
    describe: Handler | None = None
    otherwise: Handler | None = None
    table: list[Route] = field(default_factory=list)

    def without_key(self) -> Routes:
        """The same for routes that ask for no key."""
        return replace(self, key=None)

    def behind(self, key: Check | None, *checks: Check) -> Routes:
        """The same for routes that ask for another key, and make more checks."""
        return replace(self, key=key, checks=(*self.checks, *checks))

    def in_front(self, handler: Handler) -> Handler:
        """A handler behind the checks. Without any it is not even wrapped once more: that would cost each prediction."""
        checks = self.checks if self.key is None else (*self.checks, self.key)
        answered = errors_as_json(handler)
        return _checked(answered, checks) if checks else answered


def add_route(routes: Routes, methods: Sequence[str], path: str, handler: Handler) -> None:
    """Adds a route with one handler for all of its methods."""
    add_routes(routes, path, dict.fromkeys(methods, handler))


def add_routes(routes: Routes, path: str, handlers: Mapping[str, Handler]) -> None:
    """Adds a route with a handler for each method.

    Each handler is wrapped by itself: a middleware would cost every prediction two more coroutines of aiohttp's.
    """
    routes.table.append(Route(path, handlers, routes.key is not None))
    rest: dict[str, Handler] = {} if hdrs.METH_ANY in handlers else {hdrs.METH_ANY: routes.otherwise or _refuse_method}
    if rest and routes.describe is not None and hdrs.METH_OPTIONS not in handlers:
        rest = {hdrs.METH_OPTIONS: routes.describe, **rest}
    for spelling in (path,) if path.endswith((":.*}", "/")) else (path, f"{path}/"):  # TorchServe ignores a slash there
        resource = routes.router.add_resource(spelling)
        for method, handler in {**handlers, **rest}.items():
            resource.add_route(method, routes.in_front(handler), expect_handler=_expect)


def add_not_found(routes: Routes) -> None:
    """Answers for every path that has no route. Add it last."""
    handler = routes.in_front(routes.otherwise or _refuse_path)
    routes.router.add_route(hdrs.METH_ANY, "/{path:.*}", handler, expect_handler=_expect)
    asterisk = _Asterisk()
    asterisk.add_route(hdrs.METH_ANY, handler, expect_handler=_expect)
    routes.router.register_resource(asterisk)


class _Asterisk(web.PlainResource):
    """The target of `OPTIONS *`, the one that is no path."""

    def __init__(self) -> None:
        super().__init__("")
        self._path = "*"


def _checked(handler: Handler, checks: tuple[Check, ...]) -> Handler:
    @functools.wraps(handler)
    async def checked(request: web.Request) -> web.StreamResponse:
        try:
            for check in checks:
                answer = check(request)
                if answer is not None:
                    return answer
        except MinServeError as error:
            return refuse(request, error)
        return await handler(request)

    return checked


async def _expect(request: web.Request) -> web.StreamResponse | None:
    """Judges an Expect header. The 100 that it asks for is sent when the body is read, if it ever is."""
    expected = request.headers[hdrs.EXPECT]
    if request.version >= HttpVersion11 and expected.lower() != "100-continue":
        return refuse(request, refusal(417, f"Expect: found {expected[:100]!a}, allowed: 100-continue"))
    return None


async def _refuse_method(request: web.Request) -> web.StreamResponse:
    response = refuse(request, MethodNotAllowed("Requested method is not allowed, please refer to API document."))
    response.headers[hdrs.ALLOW] = allowed_methods(request)
    return response


def allowed_methods(request: web.Request) -> str:
    """The methods of a request's path, for the header Allow."""
    resource = request.match_info.route.resource
    return ", ".join(sorted({route.method for route in resource or ()} - {hdrs.METH_ANY}))


async def _refuse_path(request: web.Request) -> web.StreamResponse:
    return refuse(request, NotFound(NO_SUCH_PATH))
