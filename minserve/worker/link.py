"""One rank's socket on the server's side."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from minserve.errors import WireError
from minserve.wire.frames import FROM_RANK, FrameReader, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from minserve.wire.frames import Frame
    from minserve.wire.messages import Buffer, Hello

# Unsent bytes up to which a link takes another batch. About one scratch buffer of a rank: enough that it never waits for
# the server, little enough that a slow rank is felt after a batch or two.
ROOM_BYTES = 256 * 1024
LATER_PIECES = 16  # of small frames: what waits for a flush must not pass the mark unseen
MAX_REPLY_BYTES = 2**31  # a sanity bound on what a rank's frame may claim, not a limit for handlers


class Link(asyncio.BufferedProtocol):
    """The connection to one rank, after its HELLO.

    Args:
        hello: what the rank said of itself.
        on_frame: called with each frame.
        on_taken: called when all frames that have come together were.
        on_room: called when `has_room` has changed.
        on_lost: called once, with the reason or None for a plain EOF.
    """

    def __init__(
        self,
        hello: Hello,
        on_frame: Callable[[Link, Frame], None],
        on_taken: Callable[[], None],
        on_room: Callable[[], None],
        on_lost: Callable[[Link, str | None], None],
    ) -> None:
        self.rank = hello.rank
        self.pid = hello.pid
        self.has_room = True
        self.closed = False
        self._told = False  # that the rank has gone
        self._reader = FrameReader(MAX_REPLY_BYTES, FROM_RANK - {Kind.HELLO})
        self._on_frame = on_frame
        self._on_taken = on_taken
        self._on_room = on_room
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._later: list[Buffer] = []

    def write(self, pieces: Sequence[Buffer], *, later: bool = False) -> None:
        """Queues a frame. The pieces must not change before the socket has taken them.

        Args:
            later: it goes with the frame that is written next, or with `flush`: one system call, and one wake-up of the
                rank. Frames stay in order whichever way they go.
        """
        assert self._transport is not None
        if self.closed:
            return
        if later and len(self._later) < LATER_PIECES:
            self._later += pieces
            return
        if self._later:
            pieces = [*self._later, *pieces]
            self._later.clear()
        self._transport.writelines(pieces)

    def flush(self) -> None:
        """Queues what was kept for later."""
        if self._later:
            self.write(())

    def close(self) -> None:
        """Ends the connection without waiting for what is unsent. `on_lost` is not called for it."""
        if not self.closed:
            self.closed = True
            if self._transport is not None:
                self._transport.abort()

    # ── asyncio's calls ──

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is ours."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its base class
        self._transport.set_write_buffer_limits(high=ROOM_BYTES, low=ROOM_BYTES // 2)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        try:
            for frame in self._reader.received(nbytes):
                self._on_frame(self, frame)
                if self.closed:
                    return
            self._on_taken()
        except WireError as error:
            self._lose(str(error))

    def pause_writing(self) -> None:
        """The unsent bytes are over the mark."""
        self.has_room = False
        self._on_room()

    def resume_writing(self) -> None:
        """The unsent bytes are under the mark again."""
        self.has_room = True
        self._on_room()

    def eof_received(self) -> bool:
        """The rank has closed its socket. Ours stays open, or a rank that lives would end itself and seem to be killed."""
        if self._reader.midway:
            self._lose("closed its socket in the middle of a frame")
        else:
            self._tell(None)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone."""
        self._lose(None)

    def _lose(self, reason: str | None) -> None:
        if not self.closed:
            self.close()
            self._tell(reason)

    def _tell(self, reason: str | None) -> None:
        if not self._told:
            self._told = True
            self._on_lost(self, reason)
