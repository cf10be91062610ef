"""What a hop's socket has not taken at once: a thread sends it, in its order, while the stage works on."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from minserve.handlers.tensor_memory import memory_of
from minserve.rank.threads import HOP_THREAD


def lost(peer: str) -> dist.DistNetworkError:
    """The other end is gone. As an error of torch.distributed, for this rank is a victim like those of a collective."""
    return dist.DistNetworkError(f"the connection to {peer} is closed: it has ended, or left the pipeline")


def close_off(connection: socket.socket) -> None:
    """Nothing more is sent: there may be half a message out, and what follows it would be taken for its other half."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def behind(pieces: Sequence[Tensor], taken: int) -> list[Tensor]:
    """What follows the first so many bytes."""
    rest = []
    for piece in pieces:
        length = piece.numel()
        if taken < length:
            rest.append(piece[taken:])
        taken = max(0, taken - length)
    return rest


class Backlog:
    """Of one socket. Its thread lives while there is something to send.

    Args:
        connection: blocking. While the backlog is busy nobody else sends on it.
        peer: who is at the other end, for errors.
    """

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self._connection = connection
        self._peer = peer
        self._changed = threading.Condition()
        self._rests: deque[Rest] = deque()
        self._error: Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether something is on its way."""
        return bool(self._rests)

    def add(self, pieces: list[Tensor]) -> Rest:
        """Sends these bytes behind what is on its way. They must stay as they are."""
        with self._changed:
            rest = Rest(self, pieces)
            self._rests.append(rest)
            if len(self._rests) == 1:
                threading.Thread(target=self._work, name=HOP_THREAD, daemon=True).start()
            return rest

    def wait(self, rest: Rest) -> None:
        """Waits until it is out.

        Raises:
            torch.distributed.DistError: the other end is gone.
        """
        with self._changed:
            self._changed.wait_for(lambda: rest not in self._rests)
            if rest.pieces:
                raise lost(self._peer) from self._error

    def _work(self) -> None:
        while True:
            rest = self._rests[0]
            try:
                while rest.pieces:
                    taken = self._connection.sendmsg(map(memory_of, rest.pieces), (), socket.MSG_NOSIGNAL)
                    rest.pieces = behind(rest.pieces, taken)
            except Exception as error:
                self._error = error
                close_off(self._connection)
            with self._changed:
                if self._error is None:
                    self._rests.popleft()
                else:
                    self._rests.clear()  # whoever sends next finds out by the socket
                self._changed.notify_all()
                if not self._rests:
                    return


class Rest:
    """What is not out yet of a message.

    Attributes:
        pieces: of bytes; it keeps their memory alive.
    """

    def __init__(self, backlog: Backlog, pieces: list[Tensor]) -> None:
        self._backlog = backlog
        self.pieces = pieces

    def wait(self) -> None:
        """See `Backlog.wait`."""
        self._backlog.wait(self)
