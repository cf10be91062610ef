"""What a request must satisfy at the door: a deadline that makes sense, and room for its body."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from multidict import istr

from minserve.errors import BadRequest, Unavailable
from minserve.wire.arena import SHARE_FROM

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableSequence

    from minserve.wire.arena import Arena, Segment
    from minserve.wire.messages import Buffer

TIMEOUT_MS = istr("x-request-timeout-ms")
TIMEOUT_S = istr("x-request-timeout-seconds")  # Ray Serve's
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


def request_timeout(headers: Mapping[str, str], most: float) -> float:
    """Seconds that a request has: what its client asks for, but not more than the model allows (`most`).

    Raises:
        BadRequest: the client's wish is no positive number.
    """
    for name, unit, factor in ((TIMEOUT_MS, "milliseconds", 0.001), (TIMEOUT_S, "seconds", 1.0)):
        given = headers.get(name)
        if given is not None:
            if not _NUMBER.fullmatch(given) or not float(given):
                raise BadRequest(f"{name}: found {given[:100]!r}, allowed: a number of {unit} > 0")
            most = min(most, float(given) * factor)
    return most


class InFlightBytes:
    """The bytes of all request bodies that are in the server, against their limit.

    A body counts from before it is read until its request is answered. What the ranks still work on after its client was
    answered (a deadline that passed in flight) is bounded by their places, and does not count.

    Args:
        counts: the bytes of each process that takes requests; by default this one is the only one.
        own: this process's place among them.
    """

    def __init__(self, limit: int, counts: MutableSequence[int] | memoryview | None = None, own: int = 0) -> None:
        self._limit = limit
        self._counts = [0] if counts is None else counts
        self._own = own

    @property
    def used(self) -> int:
        """How many there are."""
        return sum(self._counts)

    def share(self) -> Share:
        """One request's part, empty at first."""
        return Share(self)

    def take(self, count: int) -> None:
        """Makes room for more bytes.

        Raises:
            Unavailable: there is none.
        """
        used = sum(self._counts)
        if used + count > self._limit:
            raise Unavailable(
                f"the request bodies in the server have {used} bytes, {count} more would exceed max_in_flight_bytes "
                f"({self._limit})"
            )
        self._counts[self._own] += count

    def give_back(self, count: int) -> None:
        """These bytes are not in the server any more."""
        self._counts[self._own] -= count


class Share:
    """What one request holds of the bytes in flight. Whoever makes one gives it back, however the request ends.

    Attributes:
        segments: the parts of its body, by index, that lie in an arena; None as long as none does.
    """

    __slots__ = ("_all", "_size", "segments")

    def __init__(self, everything: InFlightBytes) -> None:
        self._all = everything
        self._size = 0
        self.segments: dict[int, Segment] | None = None

    def grow(self, count: int) -> None:
        """Makes room for more of the body.

        Raises:
            Unavailable: there is none.
        """
        self._all.take(count)
        self._size += count

    def allocate(self, arena: Arena, index: int, length: int) -> memoryview | None:
        """Memory in the arena for a part of the body; None if there is no room."""
        segment = arena.allocate(length)
        if segment is None:
            return None
        if self.segments is None:
            self.segments = {}
        self.segments[index] = segment
        return segment.view

    def share_large(self, bodies: list[Buffer], arena: Arena) -> None:
        """Puts the large ones that are not there yet into the arena, as far as there is room; it is written to the list."""
        if self._size < SHARE_FROM:
            return
        for index, body in enumerate(bodies):
            if len(body) >= SHARE_FROM and (self.segments is None or index not in self.segments):
                view = self.allocate(arena, index, len(body))
                if view is not None:
                    view[:] = body
                    bodies[index] = view

    def give_back(self) -> None:
        """The request is answered."""
        self._all.give_back(self._size)
        self._size = 0
        if self.segments is not None:
            # Forgotten, too: a connection may know of a share for longer, which would keep the memory.
            segments, self.segments = self.segments, None
            for segment in segments.values():
                segment.release()
