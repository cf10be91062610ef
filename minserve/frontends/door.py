"""The server's end of a frontend process: its requests go to the dispatchers from here, and the answers back."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import sys
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import hdrs

from minserve.dispatch.request import Request
from minserve.errors import MinServeError, NoWorkers
from minserve.frontend.admission import InFlightBytes
from minserve.frontend.aliases import no_model_named
from minserve.frontend.auth import Kind as KeyKind
from minserve.frontends.messages import Allowed, Answered, Ask, Log, Recorded, Refused, Submit, Taken
from minserve.frontends.relay import AHEAD, Relay
from minserve.wire.frames import Kind
from minserve.wire.messages import split_body, unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minserve.dispatch.request import Reply
    from minserve.frontend.admission import Share
    from minserve.frontend.auth import Keys
    from minserve.frontends.channel import Channel
    from minserve.registry.models import Registry, ServedModel
    from minserve.wire.frames import Frame
    from minserve.wire.messages import Buffer

logger = logging.getLogger(__name__)

_AUTHORIZATION = hdrs.AUTHORIZATION.lower().encode()


class _Waiting(NamedTuple):
    """A request that has no answer yet. `share` holds what of its body lies in the model's arena."""

    request: Request
    model: ServedModel
    share: Share


class Door:
    """What one life of a frontend process has in the server.

    Args:
        keys: None where requests need none.
    """

    def __init__(self, registry: Registry, keys: Keys | None, channel: Channel) -> None:
        self._registry = registry
        self._keys = keys
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, _Waiting] = {}
        self._bodies = InFlightBytes(sys.maxsize)  # the limit is kept to where they are read
        self._relays: dict[int, Relay] = {}

    def received(self, frame: Frame) -> None:
        """Takes a frame about a request, or one that tells what was measured or shall be logged.

        Raises:
            WireError: it is not what it says.
        """
        number = frame.seq
        match frame.kind:
            case Kind.SUBMIT:
                self._admit(number, unpack(Submit, frame.meta), frame.body)
            case Kind.TAKEN if number in self._relays:
                self._relays[number].taken(unpack(Taken, frame.meta).count)
            case Kind.LEAVE:
                self._leave(number)
            case Kind.ASK:
                self._judge(number, unpack(Ask, frame.meta))
            case Kind.RECORDED:
                self._record(unpack(Recorded, frame.meta))
            case Kind.LOG:
                line = unpack(Log, frame.meta)
                logging.getLogger(line.logger).log(line.level, "%s", line.text)

    def close(self) -> None:
        """The process has gone, and its clients with it: nobody waits any more for what they have asked for."""
        for number in [*self._waiting, *self._relays]:
            self._leave(number)

    # ── a request's way in ──

    def _judge(self, number: int, ask: Ask) -> None:
        try:
            self._check_key(ask.authorization)
            timeout = math.inf
            if ask.model is not None:
                timeout = self._registry.find(ask.model, ask.version or None).spec.request_timeout
        except MinServeError as error:
            self._refuse(number, error)
        else:
            self._channel.send(Kind.ALLOWED, number, Allowed(timeout))

    def _admit(self, number: int, asked: Submit, body: bytearray) -> None:
        bodies: list[Buffer] = list(split_body(body, [part.length for part in asked.meta.parts]))
        share = self._bodies.share()
        try:
            if self._keys is not None:
                self._check_key(_authorization(asked.meta.headers))
            model = self._find(asked.model, asked.version)
            deadline = min(asked.deadline, asked.began + model.spec.request_timeout)
            named = bool(asked.version)
            arena = model.dispatcher.arena
            if arena is not None:
                share.grow(len(body))
                share.share_large(bodies, arena)
            request = Request(asked.meta, bodies, deadline, self._loop.create_future(), named=named)
            request.segments = share.segments
            try:
                model.dispatcher.begin(request)
            except NoWorkers:
                raise NoWorkers(model.spec.name, asked.version) from None
        except Exception as error:
            share.give_back()
            self._refuse(number, error)
        else:
            self._waiting[number] = _Waiting(request, model, share)
            request.reply.add_done_callback(functools.partial(self._replied, number))

    def _find(self, name: str | None, version: str) -> ServedModel:
        if name is not None:
            return self._registry.find(name, version or None)
        only = self._registry.only()
        if only is None:
            raise no_model_named()
        return only

    def _check_key(self, authorization: str) -> None:
        if self._keys is not None:
            self._keys.check(KeyKind.INFERENCE, authorization)

    def _leave(self, number: int) -> None:
        """The client of a request has left."""
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            request, dispatcher = waiting.request, waiting.model.dispatcher
            request.reply.cancel()
            dispatcher.withdraw(request)
            dispatcher.finish(request, answered=False)
            waiting.share.give_back()
        elif number in self._relays:
            self._relays.pop(number).cancel()

    # ── the answer's way out ──

    def _replied(self, number: int, reply: asyncio.Future[Reply]) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is None:  # the client has left
            if not reply.cancelled():
                reply.exception()  # nobody shall miss it
            return
        error = reply.exception()
        waiting.model.dispatcher.finish(waiting.request, answered=error is None)
        waiting.share.give_back()
        if error is None:
            self._answer(number, reply.result(), waiting.model)
        else:
            self._refuse(number, error)

    def _answer(self, number: int, reply: Reply, model: ServedModel) -> None:
        headers = tuple(reply.headers)
        if reply.stream is None:
            answered = Answered(reply.status, reply.reason, headers)
            self._channel.send_with_body(Kind.ANSWER, number, answered, [reply.body])
            return
        chunks = reply.stream.take_ready(AHEAD)
        lengths = tuple(map(len, chunks))
        head = Answered(reply.status, reply.reason, headers, model.stream_stall_timeout, lengths)
        self._channel.send_with_body(Kind.STREAM, number, head, chunks)
        self._relays[number] = Relay(number, reply.stream, self._channel, self._relays, sum(lengths))

    def _refuse(self, number: int, error: BaseException) -> None:
        if not isinstance(error, MinServeError):
            logger.error("a request from a frontend process: unforeseen", exc_info=error)
        self._channel.send(Kind.REFUSED, number, Refused.of(error))

    def _record(self, recorded: Recorded) -> None:
        for status, count in recorded.answers.items():
            for _ in range(count):  # where metrics are logged, each has its line
                self._registry.metrics.answered(status)
        for spent in recorded.spent:
            try:
                model = self._find(spent.model, spent.version)
            except MinServeError:  # it has gone meanwhile
                continue
            model.dispatcher.meters.frontend.add(spent.counts, spent.total)


def _authorization(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """As aiohttp reads it."""
    for name, value in headers:
        if name.lower() == _AUTHORIZATION:
            return value.decode("utf-8", "surrogateescape")
    return ""
