"""Rank 0's answers, checked against the batch that they are about."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.errors import WireError
from minserve.wire.messages import Answers, split_body, unpack

if TYPE_CHECKING:
    from minserve.wire.frames import Frame
    from minserve.wire.messages import Answer, Buffer
    from minserve.worker.outstanding import Outstanding


def whole_answers(batch: Outstanding, frame: Frame) -> list[tuple[Answer, Buffer]]:
    """What a REPLY says, an answer for each request of the batch.

    Raises:
        WireError: it does not fit the batch.
    """
    meta = unpack(Answers, frame.meta)
    answers = answers_of(batch, meta.answers, frame)
    if len(answers) != len(batch.requests):
        raise WireError(f"REPLY with {len(answers)} answers to a batch of {len(batch.requests)}")
    batch.seconds = meta.seconds
    return answers


def answers_of(batch: Outstanding, answers: tuple[Answer, ...], frame: Frame) -> list[tuple[Answer, Buffer]]:
    """Answers or chunks with their shares of the frame's body.

    Raises:
        WireError: they are not for requests of the batch, or not in their order.
    """
    if len(answers) == 1 and answers[0].index == 0 and answers[0].length == len(frame.body):
        return [(answers[0], frame.body)]  # the usual case without batching
    indexes = [answer.index for answer in answers]
    if indexes != sorted(set(indexes)) or (indexes and not 0 <= indexes[0] <= indexes[-1] < len(batch.requests)):
        raise WireError(f"{frame.kind.name} answers requests {indexes} of a batch of {len(batch.requests)}")
    return list(zip(answers, split_body(frame.body, [answer.length for answer in answers]), strict=True))
