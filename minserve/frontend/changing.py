"""The management routes that change what is served: register, scale, set-default, unregister (torchserve.md 2.1, 2.2, 2.4).

None of them blocks: a call that waits for workers is a coroutine that waits. What a client has asked for is done although it
leaves before the answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING, TypeVar

from minserve.errors import (
    BadRequest,
    InvalidModelVersion,
    MinServeError,
    NotFound,
    WorkerFailed,
    WorkerOutOfMemory,
)
from minserve.frontend.admission import InFlightBytes
from minserve.frontend.body import BodyReader
from minserve.frontend.errors import JSON, json_response
from minserve.frontend.parameters import Parameters
from minserve.registry.registration import Registration

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from aiohttp import web

    from minserve.config.server import ServerOptions
    from minserve.registry.models import Registry, ServedModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

PROCESSING = "Processing worker updates..."
IN_PROGRESS = "Workers scaling in progress..."
LATE_S = 5.0  # behind startupTimeout: by then a worker that does not start has been told of
PROMPT_S = 1.0  # a call that need not wait is answered by then, although another change of the model holds it up
RUNTIMES = ("python", "python3", "lsp")


class Changing:
    """What the changing routes do."""

    def __init__(self, registry: Registry, options: ServerOptions) -> None:
        self._registry = registry
        self._bodies = BodyReader(options)
        self._in_flight = InFlightBytes(options.max_in_flight_bytes)
        self._tasks: set[asyncio.Task[object]] = set()

    async def register(self, request: web.Request) -> web.Response:
        """Registers a model of the store, of a path or of an allowed address, and starts its workers."""
        parameters = await self._parameters(request)
        registration = _registration(parameters)
        synchronous = parameters.flag("synchronous", default=True)
        return await asyncio.shield(self._begin(self._register(registration, synchronous)))

    async def scale(self, request: web.Request) -> web.Response:
        """Gives a model version another number of workers."""
        parameters = Parameters.of_query(request.query)
        name, version = request.match_info["model"], request.match_info.get("version")
        version = version or parameters.text("model_version")
        fewest = _workers(parameters, "min_worker", 1)
        most = _workers(parameters, "max_worker", fewest)
        scaled = self._begin(self._registry.scale(name, version, fewest, most))
        if not parameters.flag("synchronous", default=False):
            await asyncio.wait([scaled], timeout=PROMPT_S)
            if scaled.done():
                scaled.result()
            else:
                scaled.add_done_callback(_tell_if_failed)
            return json_response({"status": PROCESSING}, 202)
        served = await asyncio.shield(scaled)
        try:
            if not await _started(served):
                return json_response({"status": IN_PROGRESS}, 206)
        except WorkerFailed as error:
            raise _not_started(served, error) from None
        of_version = f", version: {version}" if version else ""
        return json_response({"status": f"Workers scaled to {fewest} for model: {name}{of_version}"})

    async def set_default(self, request: web.Request) -> web.Response:
        """Makes a version the one that answers requests without a version."""
        name, version = request.match_info["model"], request.match_info["version"]
        self._registry.set_default(name, version)
        return json_response({"status": f'Default version successfully updated for model "{name}" to "{version}"'})

    async def unregister(self, request: web.Request) -> web.Response:
        """Takes a model version away, once the requests that it has are answered."""
        name = request.match_info["model"]
        await self._registry.unregister(name, request.match_info.get("version"))
        return json_response({"status": f'Model "{name}" unregistered'})

    # ── inside ──

    async def _parameters(self, request: web.Request) -> Parameters:
        if request.content_type != JSON:
            return Parameters.of_query(request.query)
        share = self._in_flight.share()
        try:
            body = self._bodies.take(request, share)
            if body is None:
                body = await self._bodies.read(request, share, math.inf)
            return Parameters.of_json(body)
        finally:
            share.give_back()

    async def _register(self, registration: Registration, synchronous: bool) -> web.Response:
        served = await self._registry.register(registration)
        text = f'Model "{served.spec.name}" Version: {served.spec.version} registered with {served.workers} initial workers'
        if not served.workers:
            return json_response({"status": f"{text}. Use scale workers API to add workers for the model."})
        if not synchronous:  # it stays whatever happens: who asked for it so looks for it in its description
            return json_response({"status": PROCESSING}, 202)
        if await self._begin(self._keep_if_started(served)):
            return json_response({"status": text})
        return json_response({"status": IN_PROGRESS}, 206)

    async def _keep_if_started(self, served: ServedModel) -> bool:
        """Waits for a new model's workers. One that cannot be started is unregistered again, as with TorchServe."""
        try:
            return await _started(served)
        except WorkerFailed as error:
            name, version = served.spec.name, served.spec.version
            logger.warning("%s is unregistered again, it does not start: %s", served.spec.title, error)
            try:
                if self._registry.find(name, version) is served:
                    await self._registry.unregister(name, version)
            except NotFound:  # somebody was quicker
                pass
            except InvalidModelVersion as still_there:
                logger.warning("%s", still_there)
            raise _not_started(served, error) from None

    def _begin(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Work that goes on when the client leaves. What then goes wrong is for the log."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, MinServeError):  # those are answers, or in the log already
            logger.error("a change of what is served has failed", exc_info=error)


def _registration(parameters: Parameters) -> Registration:
    url = parameters.text("url")
    if url is None:
        raise BadRequest("Parameter url is required.")
    if parameters.flag("s3_sse_kms", default=False):
        raise BadRequest("s3_sse_kms: found true, allowed: false; addresses are fetched without a signature")
    runtime = parameters.text("runtime")
    if runtime is not None and runtime.lower() not in RUNTIMES:
        raise BadRequest(f"Invalid RuntimeType value: {runtime}")
    return Registration(
        url=url,
        name=parameters.text("model_name") or None,
        handler=parameters.text("handler") or None,
        runtime=runtime,
        batch_size=parameters.whole("batch_size", least=1),
        max_batch_delay=parameters.whole("max_batch_delay", least=0),
        initial_workers=parameters.whole("initial_workers", least=0),
        response_timeout=parameters.seconds("response_timeout"),
        startup_timeout=parameters.seconds("startup_timeout"),
    )


def _workers(parameters: Parameters, name: str, default: int) -> int:
    number = parameters.whole(name, least=0)
    return default if number is None else number


async def _started(served: ServedModel) -> bool:
    """Whether all its fewest workers are READY in the time that a start may take."""
    return await served.wait_started(served.spec.startup_timeout + LATE_S)


def _tell_if_failed(scaled: asyncio.Task[ServedModel]) -> None:
    if not scaled.cancelled() and isinstance(error := scaled.exception(), MinServeError):
        logger.warning("a model is not scaled after all: %s", error)


def _not_started(served: ServedModel, error: WorkerFailed) -> MinServeError:
    """TorchServe's sentence, and the cause behind it."""
    spec = served.spec
    failed = MinServeError(f"Failed to start workers for model {spec.name} version: {spec.version}: {error}")
    if isinstance(error, WorkerOutOfMemory):
        failed.status = error.status
    return failed
