"""A rank's end of its link: blocking frames. No event loop, for a rank does one thing at a time."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from minserve.errors import WireError
from minserve.wire.arena import SHARE_FROM
from minserve.wire.frames import FROM_SERVER, HEADER, SMALL_BYTES, FrameReader, Kind
from minserve.wire.messages import Hello, pack, pack_with_body

if TYPE_CHECKING:
    from minserve.rank.memory import Replies
    from minserve.rank.process import Launch
    from minserve.wire.frames import Frame
    from minserve.wire.messages import Answers, Buffer, Message

MAX_BATCH_BYTES = 2**33  # a sanity bound; the server has its own limit on bodies
REST_MS = 500
MAX_PIECES = 512  # IOV_MAX is 1024 on Linux
MOST_DESCRIPTORS = 4


class Disconnected(Exception):
    """The server has closed the link."""


class Connection:
    """Frames over one blocking socket. `send` may be called from any thread, `receive` from one.

    Attributes:
        lost: the server has closed the link.
        replies: rank 0's shared memory for its answers.
        quiet: this rank sends next to nothing.
        spin: seconds for which `receive` looks for the next frame without giving the core away, before it sleeps.
    """

    replies: Replies | None = None
    quiet = False
    spin = 0.0

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.lost = False
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

    def receive_memory(self) -> list[int]:
        """The descriptors of shared memory in the answer to HELLO, which is the first frame; none where there is none.

        Raises:
            Disconnected: the server has closed the link.
            WireError: it is another frame.
        """
        descriptors: list[int] = []
        frames: list[Frame] = []
        while not frames:
            data, come, _, _ = socket.recv_fds(self.socket, HEADER.size, MOST_DESCRIPTORS)
            if not data:
                self.lost = True
                raise Disconnected
            descriptors += come
            self._reader.buffer()[: len(data)] = data
            frames += self._reader.received(len(data))
        if frames[0].kind is not Kind.MEMORY:
            raise WireError(f"the server answers HELLO with {frames[0].kind.name}")
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        return descriptors

    def receive(self) -> Frame:
        """The next frame.

        Raises:
            Disconnected: the server has closed the link.
            WireError: the bytes are no frame.
        """
        self._fill()
        return self._frames.popleft()

    def _fill(self) -> None:
        while not self._frames:
            if not (self.spin and self._spun()):
                self._wait()
            self._read()

    def _wait(self) -> None:
        """Sleeps until something has come. Rank 0 wakes up now and then while it has memory to give back.

        By a poll, for a recv that waits on a unix socket also wakes when the server reads what this rank has sent. One that
        is quiet waits in its recv: half the system calls.
        """
        if self.quiet:
            return
        replies = self.replies
        while not self._poll.poll(REST_MS if replies is not None and replies.touched else None):
            assert replies is not None
            with self._sending:
                replies.rest(time.monotonic())

    def _spun(self) -> bool:
        """Whether something has come while it was looked for. To be woken costs more than a batch of a fast handler."""
        until = time.perf_counter() + self.spin
        while not self._poll.poll(0):
            if time.perf_counter() >= until:
                return False
        return True

    def receive_all(self) -> list[Frame]:
        """The next frame, and those that came with it.

        Raises:
            Disconnected: the server has closed the link.
            WireError: the bytes are no frame.
        """
        self._fill()
        frames = list(self._frames)
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

    def send_answers(self, kind: Kind, answers: Answers, bodies: list[Buffer], seq: int) -> None:
        """Sends a REPLY or CHUNK. Large bodies go by shared memory, as far as there is room.

        Raises:
            Disconnected: the server has closed the link.
        """
        if self.replies is not None and max(map(len, bodies), default=0) >= SHARE_FROM:
            with self._sending:
                answers.shared, bodies = self.replies.place(bodies)
        self.send_with_body(kind, answers, bodies, seq)

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
                if len(pieces) <= MAX_PIECES:
                    self._send_all(pieces)
                    return
                for start in range(0, len(pieces), MAX_PIECES):
                    self._send_all(pieces[start : start + MAX_PIECES])
            except ConnectionError:
                self.lost = True
                raise Disconnected from None

    def _send_all(self, pieces: list[Buffer]) -> None:
        size = sum(map(len, pieces))
        if size <= SMALL_BYTES and len(pieces) > 2:
            pieces = [b"".join(pieces)]
        sent = self.socket.sendmsg(pieces)
        if sent == size:
            return
        for piece in pieces:
            if sent >= len(piece):
                sent -= len(piece)
            else:  # the socket took part of this one and nothing behind it
                self.socket.sendall(memoryview(piece)[sent:])
                sent = 0
