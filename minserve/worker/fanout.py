"""The links of all ranks as one: a batch goes to every rank in the same callback, or to none."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minserve.dispatch.clock import Clock
    from minserve.wire.messages import Buffer
    from minserve.worker.outstanding import RankLink


class Fanout:
    """Writes batches.

    Attributes:
        crowded: a link has no room for another one.
    """

    def __init__(self, clock: Clock, links: Sequence[RankLink]) -> None:
        self._clock = clock
        self._links = links
        self._flushing = False  # something waits, and a flush is to come
        self.crowded = False

    def look(self) -> None:
        """A link has come to have no room, or has room again."""
        self.crowded = not all(link.has_room for link in self._links)

    def write(self, pieces: Sequence[Buffer], *, later: bool) -> None:
        """Queues a frame for every rank.

        Args:
            later: the ranks are at work, so it may wait for others that are sent in the same turn of the loop.
        """
        for link in self._links:  # no await here, ever: this loop is what makes the order common to all ranks
            link.write(pieces, later=later)
        if later and not self._flushing:
            self._flushing = True
            self._clock.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        for link in self._links:
            link.flush()
