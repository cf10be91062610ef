"""A rank's end of its link: blocking frames. No event loop, for a rank does one thing at a time."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from typing import TYPE_CHECKING

from minserve.wire.frames import FROM_SERVER, FrameReader, Kind
from minserve.wire.messages import Hello, pack, pack_with_body

if TYPE_CHECKING:
    import socket

    from minserve.rank.process import Launch
    from minserve.wire.frames import Frame
    from minserve.wire.messages import Buffer, Message

MAX_BATCH_BYTES = 2**33  # a sanity bound; the server has its own limit on bodies
MAX_PIECES = 512  # IOV_MAX is 1024 on Linux


class Disconnected(Exception):
    """The server has closed the link."""


class Connection:
    """Frames over one blocking socket. `send` may be called from any thread, `receive` from one."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.lost = False  # the server has closed the link
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._reader = FrameReader(MAX_BATCH_BYTES, FROM_SERVER)
        self._frames: deque[Frame] = deque()
        self._sending = threading.Lock()  # a streaming handler may send from a thread of its own
        self._held: list[Buffer] = []

    def hello(self, launch: Launch) -> None:
        """Says who this rank is."""
        message = Hello(launch.rank, launch.local_rank, launch.world_size, os.getpid(), launch.worker, launch.secret)
        self.send(Kind.HELLO, message)

    def receive(self) -> Frame:
        """The next frame.

        Raises:
            Disconnected: the server has closed the link.
            WireError: the bytes are no frame.
        """
        while not self._frames:
            # A recv that waits on a unix socket also wakes when the server reads what this rank has sent; a poll does not.
            self._poll.poll()
            self._read()
        return self._frames.popleft()

    def receive_all(self) -> list[Frame]:
        """The next frame, and those that came with it.

        Raises:
            Disconnected: the server has closed the link.
            WireError: the bytes are no frame.
        """
        first = self.receive()
        if not self._frames:
            return [first]
        frames = [first, *self._frames]
        self._frames.clear()
        return frames

    @property
    def pending(self) -> bool:
        """Whether frames have been read that nobody has received yet."""
        return bool(self._frames)

    def receive_ready(self) -> list[Frame]:
        """The frames that are pending; without any, those that one read gives, so that the socket must be readable.

        Raises:
            Disconnected: the server has closed the link.
            WireError: the bytes are no frame.
        """
        if not self._frames:
            self._read()
        frames = list(self._frames)
        self._frames.clear()
        return frames

    def _read(self) -> None:
        try:
            count = self.socket.recv_into(self._reader.buffer())
        except ConnectionError:
            count = 0
        if not count:
            self.lost = True
            raise Disconnected
        self._frames.extend(self._reader.received(count))

    def send(self, kind: Kind, message: Message, seq: int = 0) -> None:
        """Sends a frame without a body.

        Raises:
            Disconnected: the server has closed the link.
        """
        self._send([pack(kind, message, seq)])

    def hold(self, kind: Kind, message: Message, seq: int = 0) -> None:
        """Sends a frame with the next one, just in front of it: one system call, and one wake-up of the server."""
        with self._sending:
            self._held.append(pack(kind, message, seq))

    def send_with_body(self, kind: Kind, message: Message, bodies: list[Buffer], seq: int) -> None:
        """Sends a frame with a body in pieces, which are not joined.

        Raises:
            Disconnected: the server has closed the link.
        """
        self._send(pack_with_body(kind, message, bodies, seq))

    def _send(self, pieces: list[Buffer]) -> None:
        with self._sending:
            if self._held:
                pieces, self._held = [*self._held, *pieces], []
            try:
                for start in range(0, len(pieces), MAX_PIECES):
                    self._send_all(pieces[start : start + MAX_PIECES])
            except ConnectionError:
                self.lost = True
                raise Disconnected from None

    def _send_all(self, pieces: list[Buffer]) -> None:
        sent = self.socket.sendmsg(pieces)
        for piece in pieces:
            if sent >= len(piece):
                sent -= len(piece)
            else:  # the socket took part of this one and nothing behind it
                self.socket.sendall(memoryview(piece)[sent:])
                sent = 0
