"""The socket between the server and a frontend process, the same on both ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from minserve.errors import WireError
from minserve.wire.frames import FrameReader, Kind, encode
from minserve.wire.messages import pack, pack_with_body

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from minserve.wire.frames import Frame
    from minserve.wire.messages import Buffer, Message

MAX_BODY = 2**31  # a sanity bound; the limits of bodies and answers are kept by those who have them


class Channel(asyncio.BufferedProtocol):
    """One end of it.

    Frames go out once the loop has run what is ready: the answers of a batch come together, and so leave together.

    Args:
        kinds: the frames that the other end may send.
        on_frame: called with each frame.
        on_lost: called once, when the other end has gone or `close` was called. The text says why, "" for a plain end.
    """

    def __init__(
        self, kinds: frozenset[Kind], on_frame: Callable[[Frame], None], on_lost: Callable[[str], None]
    ) -> None:
        self._reader = FrameReader(MAX_BODY, kinds)
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._out: list[Buffer] = []
        self._reason = ""

    def send(self, kind: Kind, number: int = 0, message: Message | None = None) -> None:
        """Sends a frame without a body."""
        self._put([pack(kind, message, number) if message is not None else encode(kind, number)])

    def send_with_body(self, kind: Kind, number: int, message: Message, bodies: Sequence[Buffer]) -> None:
        """Sends a frame. The bodies must not change before the socket has taken them."""
        self._put(pack_with_body(kind, message, bodies, number))

    def close(self) -> None:
        """Ends it once all that was sent has gone out."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Ends it at once."""
        self._out.clear()
        if self._transport is not None:
            self._transport.abort()

    def _put(self, pieces: list[Buffer]) -> None:
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out += pieces

    def _flush(self) -> None:
        if self._out and self._transport is not None:
            out, self._out = self._out, []
            if not self._transport.is_closing():
                self._transport.writelines(out)

    # ── asyncio's calls ──

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is ours."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its base class
        self._flush()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        try:
            for frame in self._reader.received(nbytes):
                self._on_frame(frame)
        except WireError as error:
            self._reason = str(error)
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone."""
        self._on_lost(self._reason)
