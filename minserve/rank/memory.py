"""The shared memory of a rank: where the server puts large request bodies, and where rank 0 puts large answers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from minserve.wire.arena import SHARE_FROM, Arena, Marks
from minserve.wire.messages import Shared
from minserve.wire.views import Views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minserve.wire.messages import Buffer


class Replies:
    """Rank 0's answers, which the server looks at until its clients have them.

    Args:
        arena: this rank owns it.
        marks: the server's.
    """

    def __init__(self, arena: Arena, marks: Marks) -> None:
        self._arena = arena
        self._marks = marks

    @property
    def touched(self) -> bool:
        """Whether it has memory that is not needed for ever."""
        return self._arena.touched

    def rest(self, now: float) -> None:
        """See `Arena.rest`."""
        self._arena.rest(now)

    def place(self, bodies: Sequence[Buffer]) -> tuple[tuple[Shared, ...], list[Buffer]]:
        """Copies the large ones into the arena, as far as there is room.

        Returns:
            Where those are, and all bodies, empty in the place of those.
        """
        rest, shared = list(bodies), []
        for index, body in enumerate(bodies):
            segment = self._arena.allocate(len(body)) if len(body) >= SHARE_FROM else None
            if segment is not None:
                segment.view[:] = body
                segment.lend(self._marks)
                segment.release()
                shared.append(Shared(index, segment.block, segment.use))
                rest[index] = b""
        return tuple(shared), rest


def open_memory(descriptors: Sequence[int], rank: int, world_size: int) -> tuple[Views | None, Replies | None]:
    """What a rank does with what the server has given it, in the order of `worker.memory.Memory.descriptors`.

    Returns:
        The views of the requests, and on rank 0 where its answers go.
    """
    if not descriptors:
        return None, None
    requests, marks, *answers = descriptors
    views = Views(requests, Marks(marks, world_size).rows[rank])
    replies = Replies(Arena(answers[0]), Marks(answers[1], 1)) if answers else None
    for descriptor in (requests, marks, *answers[1:]):  # the arena keeps its own
        os.close(descriptor)
    return views, replies
