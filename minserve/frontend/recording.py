"""GET /models/{model}/record: the batches of a worker as they go out, until the client or the worker leaves."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from aiohttp import hdrs, web

import minserve
from minserve.errors import BadRequest, NotFound
from minserve.frontend.errors import refusal
from minserve.wire.recording import Header
from minserve.worker.recorder import Recorder

if TYPE_CHECKING:
    from minserve.registry.models import ServedModel
    from minserve.worker.worker import Worker

logger = logging.getLogger(__name__)

_SWITCH = {"true": True, "false": False}


async def record(request: web.Request, model: ServedModel) -> web.StreamResponse:
    """Streams a recording. The query: `worker`, its number, 0 unless given; `bodies`, true or false, false unless given.

    It holds what clients have sent, their Authorization headers among it. One recording of a worker at a time: two would
    cost the loop twice as much, and a second one is most often a forgotten first.
    """
    spec = model.spec
    worker = _worker(request, model)
    header = Header(
        minserve.__version__,
        spec.name,
        spec.version,
        worker.who,
        spec.world_size,
        spec.config.batch_size,
        _bodies(request),
        time.time(),
    )
    recorder = Recorder(header)
    if not worker.attach_recorder(recorder):
        raise refusal(409, f"{worker.who} is being recorded already; a worker has one recording at a time")
    logger.info("%s: recording begins%s", worker.who, ", with bodies" if header.bodies else "")
    response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "application/octet-stream"})
    response.enable_chunked_encoding()
    try:
        await response.prepare(request)
        while (records := await recorder.next()) is not None:
            await response.write(records)
        await response.write_eof()
    except ConnectionError as error:  # seen before the loop has cancelled this call
        logger.debug("%s: whoever recorded it has left: %s", worker.who, error)
    finally:
        worker.detach_recorder()
        logger.info("%s: recording ends", worker.who)
    return response


def _worker(request: web.Request, model: ServedModel) -> Worker:
    numbers = [report.number for report in model.supervisor.report()]
    allowed = ", ".join(map(str, numbers)) or f"none, {model.spec.name} has no worker just now"
    given = request.query.get("worker", "0")
    if not (given.isascii() and given.isdigit()):
        raise BadRequest(f"worker: found {given[:100]!r}, allowed: {allowed}")
    worker = model.supervisor.worker(int(given)) if len(given) < 10 else None
    if worker is None:
        raise NotFound(f"worker: found {given[:100]}, allowed: {allowed}")
    return worker


def _bodies(request: web.Request) -> bool:
    given = request.query.get("bodies", "false")
    if given not in _SWITCH:
        raise BadRequest(f"bodies: found {given[:100]!r}, allowed: true, false")
    return _SWITCH[given]
