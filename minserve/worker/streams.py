"""How far the ranks may go in a streaming batch: grants, back-pressure and cancel, the same for every rank.

A rank takes no step that was not granted. While every client of the batch keeps up, steps are granted ahead of what rank 0
has sent; when one does not, no more are, and all ranks come to stand at the same step. When all clients have left, the
stream is cancelled behind the last granted step, which no rank has passed: all leave the batch there, in step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.wire.frames import Kind
from minserve.wire.messages import Step, pack

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from minserve.worker.outstanding import Limits, Outstanding, RankLink

AHEAD = 8  # steps for each that came with the last read of rank 0's link
# To the end of what was granted the ranks go when their clients have left, and steps may have become slow.
MOST_AHEAD = 64
WITHOUT_END = 2**62


class Streams:
    """Grants the steps of one worker's streams.

    Each grant wakes every rank, which costs more than a quick step, and ranks that have used theirs up wait for the server.
    So unless the configuration says how many, it goes by the steps that come together: while they take their time each comes
    alone, and few are granted that would be taken in vain once the clients leave.

    All that was granted may come to wait for a slow client, so many steps are granted of small chunks only: one read gives
    few bytes (`SCRATCH_BYTES`), and a chunk in shared memory, which takes none of them, counts as if it had come alone.

    Args:
        steps: how many steps a rank has counted in a batch, from the board.

    Attributes:
        first: how many are granted with the batch.
    """

    def __init__(self, links: Sequence[RankLink], limits: Limits, steps: Callable[[int, int], int]) -> None:
        self._links = links
        self._fixed = limits.stream_ahead
        self.first = self._fixed or AHEAD
        self._any_order = limits.any_order
        self._steps = steps

    def govern(self, batch: Outstanding) -> None:
        """Grants more steps, or none, or cancels: whatever the clients of the batch ask for by now."""
        if batch.cancelled:
            return
        waiting = [request for request in batch.requests if not request.left]
        if not waiting and self._may_cancel(batch):
            batch.cancelled = True
            self._tell(Kind.CANCEL, batch, batch.granted)
            return
        room = all(request.stream is None or request.stream.has_room for request in waiting)
        ahead = self._fixed or min(AHEAD * batch.burst, MOST_AHEAD)
        if room and batch.granted - batch.step <= ahead // 2:  # not with each step
            batch.granted = batch.step + ahead
            self._tell(Kind.GRANT, batch, batch.granted)

    def let_go_on(self, batch: Outstanding) -> None:
        """Its clients have had an error. A rank that has not heard of it is to come to where it does, waiting for nobody."""
        if not batch.cancelled and batch.granted < WITHOUT_END:
            batch.granted = WITHOUT_END
            self._tell(Kind.GRANT, batch, batch.granted)

    def _may_cancel(self, batch: Outstanding) -> bool:
        """Whether every rank takes part in the stream. One that has counted no step may be in another place altogether.

        A handler that sends on rank 0 alone runs on, for nobody, to its end. A single rank keeps step with nobody.
        """
        return self._any_order or all(self._steps(link.rank, batch.seq) for link in self._links)

    def _tell(self, kind: Kind, batch: Outstanding, step: int) -> None:
        frame = [pack(kind, Step(step), batch.seq)]
        for link in self._links:
            link.write(frame)
