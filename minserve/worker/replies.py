"""Rank 0's answers, checked against the batch that they are about."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.errors import WireError
from minserve.wire.messages import Answers, inline_lengths, split_body, unpack

if TYPE_CHECKING:
    from minserve.wire.frames import Frame
    from minserve.wire.messages import Answer, Buffer
    from minserve.worker.memory import Memory
    from minserve.worker.outstanding import Outstanding


def whole_answers(batch: Outstanding, frame: Frame, memory: Memory | None = None) -> list[tuple[Answer, Buffer]]:
    """What a REPLY says, an answer for each request of the batch.

    Raises:
        WireError: it does not fit the batch.
    """
    meta = unpack(Answers, frame.meta)
    answers = answers_of(batch, meta, frame, memory)
    if len(answers) != len(batch.requests):
        raise WireError(f"REPLY with {len(answers)} answers to a batch of {len(batch.requests)}")
    batch.seconds = meta.seconds
    return answers


def answers_of(batch: Outstanding, meta: Answers, frame: Frame, memory: Memory | None) -> list[tuple[Answer, Buffer]]:
    """Answers or chunks with their shares of the frame's body, or views of the shared memory.

    Raises:
        WireError: they are not for requests of the batch, or not in their order, or are not where they are said to be.
    """
    answers = meta.answers
    if len(answers) == 1 and answers[0].index == 0 and answers[0].length == len(frame.body):
        return [(answers[0], frame.body)]  # the usual case without batching
    indexes = [answer.index for answer in answers]
    if indexes != sorted(set(indexes)) or (indexes and not 0 <= indexes[0] <= indexes[-1] < len(batch.requests)):
        raise WireError(f"{frame.kind.name} answers requests {indexes} of a batch of {len(batch.requests)}")
    lengths = [answer.length for answer in answers]
    if not meta.shared:
        return list(zip(answers, split_body(frame.body, lengths), strict=True))
    if memory is None or memory.answers is None:
        raise WireError(f"{frame.kind.name} with answers in shared memory, of which there is none")
    bodies: list[Buffer] = list(split_body(frame.body, inline_lengths(lengths, meta.shared)))
    for place in meta.shared:
        bodies[place.index] = memory.answers.view(place.block, place.use, lengths[place.index])
    return list(zip(answers, bodies, strict=True))
