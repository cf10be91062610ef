"""A socket of a hop that takes as much as a test lets it, and says so to nobody but the test."""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterable
from typing import cast

from tests.unit.rank.rig import DEADLINE_S

Order = int | Exception


class Wire:
    """What is sent lies in `taken`; what is received comes from there.

    Args:
        room: bytes that it takes at once. More waits for `let`.
    """

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self.taken = bytearray()
        self.blocked: queue.SimpleQueue[int] = queue.SimpleQueue()  # bytes of each call that waits
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()

    @property
    def socket(self) -> socket.socket:
        return cast("socket.socket", self)

    def let(self, *orders: Order) -> None:
        """How many bytes the next calls that wait take, or what they raise."""
        for order in orders:
            self._orders.put(order)

    def sendmsg(self, pieces: Iterable[memoryview], ancillary: tuple[()], flags: int) -> int:
        data = b"".join(pieces)
        if flags & socket.MSG_DONTWAIT:
            if not self.room:
                raise BlockingIOError
            taken = min(self.room, len(data))
            self.room -= taken
            order: Order = taken
        else:
            self.blocked.put(len(data))
            order = self._orders.get(timeout=DEADLINE_S)
        if isinstance(order, Exception):
            raise order
        self.taken += data[:order]
        return min(order, len(data))

    def recv_into(self, room: memoryview, count: int, flags: int) -> int:
        """As one that a signal interrupts: never more than 1000 bytes in a call."""
        data = bytes(self.taken[: min(len(room), 1000)])
        room[: len(data)] = data
        del self.taken[: len(data)]
        return len(data)

    def shutdown(self, how: int) -> None:
        self.taken += b"shut down"

    def setblocking(self, flag: bool) -> None:
        pass

    def next_blocked(self) -> int:
        """Waits for a call that waits. Returns how much it would send."""
        return self.blocked.get(timeout=DEADLINE_S)
