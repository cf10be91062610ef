"""The models as a frontend process sees them: it knows none, and leaves every decision about them to the server.

A copy of the registry here would save a large body its question. It would also answer for a model that has just been
registered, unregistered or made the default with what was true a moment ago.
"""

from __future__ import annotations

import asyncio
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import hdrs

from minserve.errors import MinServeError
from minserve.frontend.body import printable
from minserve.frontend.errors import errors_as_json
from minserve.frontend.inference import Inference
from minserve.frontend.routing import Routes
from minserve.frontends.messages import ToldError
from minserve.frontends.uplink import RelayedStream

if TYPE_CHECKING:
    from aiohttp import web

    from minserve.config.server import ServerOptions
    from minserve.dispatch.request import Reply, Request
    from minserve.frontend.admission import InFlightBytes, Share
    from minserve.frontend.models import Model, Seconds
    from minserve.frontend.routing import Handler
    from minserve.frontends.recorded import Measured
    from minserve.frontends.uplink import Uplink
    from minserve.wire.messages import Buffer

MOST_NAMES = 1000  # of models that are kept; clients may ask for any


@dataclass(frozen=True, slots=True)
class RemoteSpec:
    """The name is all that is known of a model; how long a request may take the server knows."""

    name: str
    request_timeout: float = math.inf


class RemoteModel:
    """A model version as requests name it, with its queue.

    Args:
        asked: its name; None for the only model that there is.
        version: "" for the default one.

    Attributes:
        stream_stall_timeout: as the latest stream had it.
    """

    gone = False
    arena = None  # the server has it: bodies go there in frames

    def __init__(self, asked: str | None, version: str, uplink: Uplink, measured: Measured) -> None:
        self.asked = asked
        self.spec = RemoteSpec(asked or "")
        self.version = version
        self.stream_stall_timeout = 0.0
        self._uplink = uplink
        self._measured = measured

    @property
    def dispatcher(self) -> RemoteModel:
        """Takes its requests."""
        return self

    @property
    def meters(self) -> RemoteModel:
        """What is measured of it."""
        return self

    @functools.cached_property
    def frontend(self) -> Seconds:
        """Seconds spent on reading a request and on making its answer. Made with the first that has an answer."""
        return self._measured.spent(self.asked, self.version)

    async def submit(self, request: Request) -> Reply:
        """See `Uplink.submit`."""
        reply = await self._uplink.submit(self.asked, self.version, request)
        self.finish(request, answered=True)
        return reply

    def begin(self, request: Request) -> None:
        """See `Dispatcher.begin`. It never refuses: that comes as the reply."""
        self._uplink.begin(self.asked, self.version, request)

    def withdraw(self, request: Request) -> None:
        """See `Dispatcher.withdraw`."""
        self._uplink.withdraw(request)

    def finish(self, request: Request, answered: bool) -> None:
        """See `Dispatcher.finish`."""
        if isinstance(request.stream, RelayedStream):
            self.stream_stall_timeout = request.stream.stall_timeout


class RemoteModels:
    """All models that clients may ask for."""

    def __init__(self, uplink: Uplink, measured: Measured) -> None:
        self.metrics = measured
        self._uplink = uplink
        self._models: dict[tuple[str | None, str], RemoteModel] = {}

    def find(self, name: str, version: str | None = None) -> RemoteModel:
        """Any: whether it exists the server says."""
        return self._model(printable(name), printable(version or ""))

    def only(self) -> RemoteModel:
        """The only model, if there is one."""
        return self._model(None, "")

    def _model(self, asked: str | None, version: str) -> RemoteModel:
        model = self._models.get((asked, version))
        if model is None:
            if len(self._models) >= MOST_NAMES:
                self._models.clear()
            model = self._models[asked, version] = RemoteModel(asked, version, self._uplink, self.metrics)
        return model


class RemoteInference(Inference):
    """Inference that asks the server before it reads a body that was not there with its head."""

    def __init__(self, models: RemoteModels, options: ServerOptions, in_flight: InFlightBytes, uplink: Uplink) -> None:
        super().__init__(models, options, in_flight)
        self._uplink = uplink

    async def _read(
        self, request: web.Request, model: Model | None, share: Share, deadline: float, whole: bool
    ) -> Buffer:
        now = asyncio.get_running_loop().time()
        authorization = request.headers.get(hdrs.AUTHORIZATION, "")
        known = model if isinstance(model, RemoteModel) else None
        name, version = (known.asked, known.version) if known is not None else (None, "")
        timeout = await self._uplink.ask(name, version, printable(authorization))
        return await super()._read(request, model, share, min(deadline, now + timeout), whole)


@dataclass(frozen=True, slots=True)
class RemoteRoutes(Routes):
    """Routes on which the server's refusal of a request goes before one from here.

    In one process the key is looked at first, then the model, and the body last. Here the body is looked at first, as it
    comes; so when there is something wrong with it the server is asked whether there is not something else wrong.
    """

    uplink: Uplink | None = None

    def in_front(self, handler: Handler) -> Handler:
        """A handler behind that."""
        uplink = self.uplink
        assert uplink is not None

        @functools.wraps(handler)
        async def judged(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except ToldError:
                raise
            except MinServeError:
                match = request.match_info
                name = printable(match["model"]) if "model" in match else None
                authorization = printable(request.headers.get(hdrs.AUTHORIZATION, ""))
                await uplink.ask(name, printable(match.get("version", "")), authorization)
                raise

        return errors_as_json(judged)
