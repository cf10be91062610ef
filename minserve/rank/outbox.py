"""What a rank says at the end of a load or of a batch, each time with the metrics that were recorded until then."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from minserve.rank import metrics
from minserve.rank.context import are_plain
from minserve.rank.data import Refused, check_answers, encode_answer
from minserve.rank.streaming import encode
from minserve.wire.frames import Kind
from minserve.wire.messages import Answer, Answers, Failure, Metrics

if TYPE_CHECKING:
    from minserve.rank.connection import Connection
    from minserve.rank.context import Context
    from minserve.rank.streaming import Chunks
    from minserve.wire.messages import Loaded

logger = logging.getLogger(__name__)

METRICS_PER_FRAME = 10_000  # far below what a frame may hold


class Outbox:
    """The last frames of a rank's batches.

    Args:
        rank: this rank.
        reply_done: a rank other than 0 says when it is through.
    """

    def __init__(self, connection: Connection, rank: int, reply_done: bool) -> None:
        self._connection = connection
        self._rank = rank
        self._reply_done = reply_done

    def loaded(self, loaded: Loaded) -> None:
        """The handler is ready."""
        self._hold_metrics(0)
        self._connection.send(Kind.LOADED, loaded)

    def load_failed(self, failure: Failure) -> None:
        """The handler could not be loaded."""
        self._hold_metrics(0)
        self._connection.send(Kind.FAILED, failure)

    def answer(
        self, answers: object, stream: Chunks, context: Context, seq: int, count: int, seconds: float = 0.0
    ) -> None:
        """The answers of a batch, if this is rank 0, and else that it is through.

        Args:
            seconds: that it was in `handle`.

        Raises:
            Refused: they cannot be sent.
        """
        if self._rank != 0:
            self.through(seq, count)
            return
        stream.end()
        if stream.refused or (answers is None and stream.step):
            answers = [b""] * count  # a stream need not have a last chunk
        values = check_answers(answers, count)
        if are_plain(context):
            bodies = [encode_answer(value, index) for index, value in enumerate(values)]
            metas = [Answer(index, len(body)) for index, body in enumerate(bodies)]
        else:
            encoded = [encode(context, index, value) for index, value in enumerate(values)]
            metas = [answer for answer, _ in encoded]
            bodies = [body for _, body in encoded]
        self._hold_metrics(seq)
        self._connection.send_answers(Kind.REPLY, Answers(tuple(metas), stream.step, seconds), bodies, seq)

    def through(self, seq: int, count: int) -> None:
        """The end of a batch on another rank than 0."""
        logger.debug("skip sending response at rank %d", self._rank)
        if self._reply_done or not count:
            self._hold_metrics(seq)
            self._connection.send(Kind.DONE, Answers(()), seq)
        else:
            for frame in _take_metrics():
                self._connection.send(Kind.METRICS, frame, seq)

    def failed(self, failure: Failure, seq: int) -> None:
        """A batch has ended with an exception."""
        self._hold_metrics(seq)
        self._connection.send(Kind.ERROR, failure, seq)

    def refused(self, refusal: Refused, seq: int) -> None:
        """What a handler has returned cannot be sent."""
        self.failed(Failure("refused", "", str(refusal), "", "", self._rank, ()), seq)

    def refused_chunk(self, refusal: Refused, seq: int) -> None:
        """What a handler has sent before its end cannot be sent."""
        self.failed(Failure("chunk", "", str(refusal), "", "", self._rank, ()), seq)

    def _hold_metrics(self, seq: int) -> None:
        """They go with the frame that comes next."""
        for frame in _take_metrics():
            self._connection.hold(Kind.METRICS, frame, seq)


def _take_metrics() -> list[Metrics]:
    taken = metrics.take()
    if not taken:
        return []
    return [
        Metrics(tuple(taken[start : start + METRICS_PER_FRAME])) for start in range(0, len(taken), METRICS_PER_FRAME)
    ]
