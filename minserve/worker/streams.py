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


class Streams:
    """Grants the steps of one worker's streams.

    Args:
        steps: how many steps a rank has counted in a batch, from the board.
    """

    def __init__(self, links: Sequence[RankLink], limits: Limits, steps: Callable[[int, int], int]) -> None:
        self._links = links
        self._ahead = limits.stream_ahead
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
        if room and batch.granted - batch.step <= self._ahead // 2:  # not with each step: a grant wakes every rank
            batch.granted = batch.step + self._ahead
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
