"""A stream on its way to a frontend process: no more is sent than its client has nearly taken."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from minserve.errors import MinServeError
from minserve.frontends.messages import Piece, Refused
from minserve.wire.frames import Kind

if TYPE_CHECKING:
    from minserve.dispatch.request import Stream
    from minserve.frontends.channel import Channel

logger = logging.getLogger(__name__)

AHEAD = 65536  # bytes that may be under way to a client and not taken yet


class Relay:
    """Sends a stream until it ends.

    What waits for a slow client waits in the stream itself, which holds back the ranks once it is full. Nothing else would:
    the other end of the channel reads for all its clients.

    Args:
        relays: where this one is to be found by its number while it is at work.
        sent: bytes of it that are under way already, with its head.
    """

    def __init__(self, number: int, stream: Stream, channel: Channel, relays: dict[int, Relay], sent: int = 0) -> None:
        self._number = number
        self._stream = stream
        self._channel = channel
        self._relays = relays
        self._under_way = sent
        self._room = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def taken(self, count: int) -> None:
        """The client has taken so many bytes more."""
        self._under_way -= count
        if self._under_way < AHEAD:
            self._room.set()

    def cancel(self) -> None:
        """The client has left."""
        self._task.cancel()
        self._stream.mute()  # at once: a task that has not begun never comes to its `finally`

    async def _run(self) -> None:
        number, channel = self._number, self._channel
        try:
            await self._wait_for_room()
            while chunks := await self._stream.take(AHEAD - self._under_way):
                lengths = tuple(map(len, chunks))
                channel.send_with_body(Kind.PIECE, number, Piece(lengths), chunks)
                self._under_way += sum(lengths)
                await self._wait_for_room()
            channel.send(Kind.END, number)
        except Exception as error:
            if not isinstance(error, MinServeError):
                logger.exception("a stream to a frontend process: unforeseen")
            channel.send(Kind.REFUSED, number, Refused.of(error))
        finally:
            self._stream.mute()
            self._relays.pop(number, None)

    async def _wait_for_room(self) -> None:
        while self._under_way >= AHEAD:
            self._room.clear()
            await self._room.wait()
