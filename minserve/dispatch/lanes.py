"""The workers of one model version as the dispatcher sees them, and which of them gets the next batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from minserve.dispatch.request import Request


class Lane(Protocol):
    """What a worker is to the dispatcher: somewhere a batch can go."""

    @property
    def under_way(self) -> int:
        """How many batches it works on, or has before it."""

    @property
    def batch_seconds(self) -> float | None:
        """How long a batch usually takes it; None before the first."""

    def has_place(self, *, full: bool, ahead: int = 0) -> bool:
        """Whether a batch may be sent now: there is a place, and every rank's link has room.

        Args:
            full: it has as many requests as a batch may have. One that is not goes ahead of no other
                unless `inFlight` says so.
            ahead: asks for the time when so many more have been sent.
        """

    def send(self, requests: list[Request]) -> None:
        """Sends a batch to all ranks. From here on the lane answers these requests, whatever happens."""


class Lanes:
    """Those that take batches."""

    def __init__(self) -> None:
        self._lanes: list[Lane] = []  # whose turn it is first

    def add(self, lane: Lane) -> None:
        """A worker is ready."""
        self._lanes.append(lane)

    def remove(self, lane: Lane) -> None:
        """A worker takes no more batches, if it did."""
        if lane in self._lanes:
            self._lanes.remove(lane)

    def next(self, *, full: bool) -> Lane | None:
        """The one with the fewest batches before it, of those with a place; among equals in turn.

        In turn, so that none stays cold under a light load.
        """
        if len(self._lanes) == 1:
            return self._lanes[0] if self._lanes[0].has_place(full=full) else None
        best: Lane | None = None
        fewest = 0
        for lane in self._lanes:
            if lane.has_place(full=full):
                under_way = lane.under_way
                if not under_way:
                    return lane
                if best is None or under_way < fewest:
                    best, fewest = lane, under_way
        return best

    def takes(self, lane: Lane) -> None:
        """It gets the batch, and is the last in turn now."""
        if len(self._lanes) > 1:
            self._lanes.remove(lane)
            self._lanes.append(lane)

    def is_last_place(self, lane: Lane) -> bool:
        """Whether a batch for this lane, which has a place, leaves none for the next one that is not full."""
        return not any(one.has_place(full=False, ahead=int(one is lane)) for one in self._lanes)

    def seconds_to_a_place(self, lane: Lane) -> float | None:
        """How long it usually takes, with all of them at work, until one has a place again; None: nobody knows."""
        seconds = lane.batch_seconds
        return None if seconds is None else seconds / len(self._lanes)
