"""What is measured of a worker's batches, for the metrics and for whoever decides when the next one goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.dispatch.dispatcher import DESCRIBE

if TYPE_CHECKING:
    from minserve.dispatch.request import Request
    from minserve.telemetry.meters import ModelMeters
    from minserve.worker.outstanding import Outstanding

NEWEST = 0.2  # share of the last batch in how long one usually takes


class Timing:
    """Takes the times of batches that somebody has asked for. All times are on the meters' clock.

    Attributes:
        batch_seconds: how long the ranks usually take for a batch, from when it is their oldest until rank 0 has answered;
            None before the first.
    """

    def __init__(self, meters: ModelMeters) -> None:
        self._meters = meters
        self._replied = 0.0
        self.batch_seconds: float | None = None

    def sent(self, batch: Outstanding, began: float) -> None:
        """A batch has been written to every link; `began`: the server began to."""
        batch.began, batch.written = began, self._meters.now()
        self._meters.batch_sent(len(batch.requests), began, batch.written)

    def answered(self, batch: Outstanding, answered: list[Request], replied: float) -> None:
        """Rank 0 has answered; these requests took their answers."""
        meters = self._meters
        took = replied - max(batch.written, self._replied)
        last = took if self.batch_seconds is None else self.batch_seconds
        self.batch_seconds = last + (took - last) * NEWEST
        self._replied = replied
        if batch.requests[0].meta.operation != DESCRIBE:  # which travels alone
            for request in answered:
                meters.answered(request.named, request.entered, request.sent, replied)
        overhead = batch.written - batch.began + meters.now() - replied
        meters.batch_answered(len(batch.requests), batch.written, replied, overhead)
        meters.handled(batch.seconds or 0.0, [request.meta.id for request in batch.requests])
