"""The shared memory of one incarnation of a worker: what its ranks are given, and how large bodies are sent by it."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING

from minserve.wire.arena import BLOCK_BYTES, Arena, Marks, new_memory
from minserve.wire.frames import Kind, encode
from minserve.wire.messages import Shared
from minserve.wire.views import Views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minserve.dispatch.request import Request
    from minserve.wire.arena import Segment
    from minserve.wire.messages import Buffer
    from minserve.worker.spec import ModelSpec

logger = logging.getLogger(__name__)


def new_arena(spec: ModelSpec) -> Arena | None:
    """An arena for the requests of a model version; None where all bodies go over the sockets."""
    options = spec.config.minserve
    blocks = options.shared_memory // BLOCK_BYTES
    if not blocks or options.socket_type != "unix":  # no other socket carries descriptors
        return None
    try:
        return Arena(new_memory("minserve-requests", blocks * BLOCK_BYTES))
    except OSError as error:
        logger.warning("%s: large bodies go over the sockets, for there is no shared memory: %s", spec.title, error)
        return None


class Memory:
    """One incarnation's.

    Args:
        requests: the model version's arena, which all its workers share. As large is the one for rank 0's answers.
        ranks: how many there are.

    Attributes:
        answers: rank 0's large answers, to be looked at; None once the ranks are dead.
    """

    def __init__(self, requests: Arena, ranks: int) -> None:
        self.requests = requests
        self._descriptors: list[int] = []
        try:
            self._descriptors.append(requests.open_for_readers())
            marks = self._new("minserve-marks", Marks.size(ranks, requests.blocks))
            answers = self._new("minserve-answers", requests.blocks * BLOCK_BYTES)
            answer_marks = self._new("minserve-marks", Marks.size(1, requests.blocks))
            self.marks = Marks(marks, ranks)
            self.answers: Views | None = Views(answers, Marks(answer_marks, 1).rows[0])
        except OSError:
            self.close_descriptors()
            raise

    def _new(self, name: str, size: int) -> int:
        self._descriptors.append(new_memory(name, size))
        return self._descriptors[-1]

    def descriptors(self, rank: int) -> list[int]:
        """What a rank gets: the requests, read-only, and their marks; rank 0 also the answers and theirs."""
        return self._descriptors if rank == 0 else self._descriptors[:2]

    @property
    def held(self) -> int:
        """Bytes of answers that clients have not got yet."""
        return self.answers.held if self.answers is not None else 0

    def close_descriptors(self) -> None:
        """Every rank has its own."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def close(self) -> None:
        """The ranks are dead: what they were lent is free.

        Nothing is left to the garbage collector, which comes by too seldom for memory and descriptors. Answers that clients
        have not taken yet stay as long as they are looked at.
        """
        self.close_descriptors()
        self.marks.close()
        self.answers = None

    def lend(self, segments: Sequence[Segment]) -> None:
        """Every rank is about to be told of these."""
        for segment in segments:
            segment.lend(self.marks)


def give(memory: Memory | None, connection: socket.socket, rank: int) -> None:
    """Answers a rank's HELLO. Without shared memory, all its bodies will be in frames.

    Raises:
        OSError: it has gone.
    """
    frame = encode(Kind.MEMORY)  # a fresh socket takes it whole, and the descriptors with its first byte
    if memory is None:
        connection.send(frame)
    else:
        socket.send_fds(connection, [frame], memory.descriptors(rank))


def place_bodies(
    memory: Memory | None, requests: Sequence[Request]
) -> tuple[list[Buffer], tuple[Shared, ...], list[Segment]]:
    """The bodies of a batch: those that go in its frame, and those that its ranks find in the arena.

    Returns:
        A buffer for each part, empty for one in the arena; where those are; and their segments, to be lent.
    """
    bodies: list[Buffer] = []
    shared: list[Shared] = []
    segments: list[Segment] = []
    for request in requests:
        for index, body in enumerate(request.bodies):
            segment = request.segments.get(index) if request.segments else None
            if segment is None:
                bodies.append(body)
            elif memory is not None and segment.arena is memory.requests:
                shared.append(Shared(len(bodies), segment.block, segment.use))
                segments.append(segment)
                bodies.append(b"")
            else:  # another version's, or for sockets alone: they may have it longer than its segment is held
                bodies.append(bytes(body))
    return bodies, tuple(shared), segments
