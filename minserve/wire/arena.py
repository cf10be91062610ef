"""An arena: shared memory in which one process writes large bodies once, for all who read them.

    owner   ── writes a body into a free segment, sends every reader (block, use), lends it to them
    readers ── look at the body where it lies, and each marks the use as over in a row of its own (`Marks`)
    owner   ── looks at the marks when it needs room: no message frees a segment

The server owns one for the request bodies of a model version, rank 0 of each worker one for its large answers. The memory is
a memfd: it has no name that could be left behind, and is gone with the last process that has it. Pages cost nothing before
they are written to, and are used again from the lowest address on, so that they stay few and warm.

`use` numbers the segments in the order in which they were given out, and none is given out again before every reader it was
lent to has marked just that number. A mark that comes late, or twice, so frees nothing else.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK_BYTES = 64 * 1024  # what segments are made of; a multiple of the page, so that free ones can be given back
# Bytes of a body from which on the arena is worth its bookkeeping. Measured on two cores, broadcast and reply: up to 32 KiB
# frames are even or ahead, at 64 KiB both are even, at 256 KiB frames take 1.5 times as long to 1 rank, 1.9 times to 8.
SHARE_FROM = 64 * 1024
IDLE_S = 30.0
REST_BLOCKS = 64  # 4 MiB: about a millisecond of the caller's time
_MARK_BYTES = 8


def new_memory(name: str, size: int) -> int:
    """The descriptor of fresh shared memory of so many bytes, all 0. It can neither shrink under a reader nor grow."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


class Marks:
    """Which uses each reader is through with: a row of u64 for each reader, one for each block, which it alone writes.

    Args:
        descriptor: of memory of `size(readers, blocks)` bytes, all 0 at first. It can be closed afterwards.

    Attributes:
        over: the readers are dead: whatever they were lent is free.
    """

    def __init__(self, descriptor: int, readers: int) -> None:
        words = memoryview(mmap.mmap(descriptor, 0)).cast("Q")
        blocks = len(words) // readers
        self.rows: Sequence[memoryview] = [
            words[start : start + blocks] for start in range(0, readers * blocks, blocks)
        ]
        self.over = False

    @staticmethod
    def size(readers: int, blocks: int) -> int:
        """Bytes of the marks of so many readers."""
        return readers * blocks * _MARK_BYTES

    def close(self) -> None:
        """The readers are dead. What was lent to them may know of these marks for longer, but not keep their memory."""
        self.over, self.rows = True, ()

    def released(self, block: int, use: int) -> bool:
        """Whether every reader is through with a use."""
        return self.over or all(row[block] == use for row in self.rows)


class Arena:
    """The owner's side.

    Args:
        descriptor: of the memory, writable. It is closed with the arena, by `close` or when nobody knows it any more.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self._map = mmap.mmap(descriptor, 0)
        self._view = memoryview(self._map)
        self._taken = bytearray(len(self._view) // BLOCK_BYTES)  # 1 for a block in use
        self._lent: list[Segment] = []  # the owner is through with these, perhaps not every reader
        self._use = 0
        self._touched = 0  # blocks from the start that may have pages
        self._used_until = (0, 0.0)  # the latest use that `rest` has seen, and when

    def close(self) -> None:
        """Nothing is allocated any more, and no reader comes. The memory is gone once no segment of it is looked at."""
        self._close()
        self._descriptor = -1
        self._view = memoryview(b"")
        self._map = mmap.mmap(-1, mmap.PAGESIZE)
        self._touched = 0

    def open_for_readers(self) -> int:
        """A new descriptor of the memory, through which it cannot be written to."""
        return os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self._taken)

    @property
    def used(self) -> int:
        """Bytes of the segments that are not free."""
        self._collect()
        return sum(self._taken) * BLOCK_BYTES

    def allocate(self, length: int) -> Segment | None:
        """A segment for a body of `length` bytes, at least 1; None if there is no room for it just now."""
        self._collect()
        if self._descriptor < 0:
            return None
        count = -(-length // BLOCK_BYTES)
        block = self._taken.find(bytes(count))  # the first run of so many free ones
        if block < 0:
            return None
        self._taken[block : block + count] = b"\1" * count
        self._touched = max(self._touched, block + count)
        self._use += 1
        start = block * BLOCK_BYTES
        return Segment(self, block, self._use, self._view[start : start + length])

    @property
    def touched(self) -> bool:
        """Whether it may have memory that `rest` could give back."""
        return self._touched > 0

    def rest(self, now: float) -> None:
        """Gives memory back to the system once nothing has been allocated for a while.

        A few MiB a call, from the top down to the first segment in use. Earlier it is worth keeping, for to touch fresh
        memory costs more than to copy a body.

        Args:
            now: seconds on a clock of the caller's, who calls again and again.
        """
        if self._use != self._used_until[0]:
            self._used_until = self._use, now
        elif self._touched and now - self._used_until[1] >= IDLE_S:
            self._collect()
            top, start = self._touched, max(self._taken.rfind(b"\1") + 1, self._touched - REST_BLOCKS)
            if start < top:
                self._map.madvise(mmap.MADV_REMOVE, start * BLOCK_BYTES, (top - start) * BLOCK_BYTES)
                self._touched = start

    def _collect(self) -> None:
        if self._lent:
            self._lent = [segment for segment in self._lent if not self._free(segment)]

    def _free(self, segment: Segment) -> bool:
        if not all(marks.released(segment.block, segment.use) for marks in segment.lent_to):
            return False
        count = -(-segment.length // BLOCK_BYTES)
        self._taken[segment.block : segment.block + count] = bytes(count)
        return True

    def _done(self, segment: Segment) -> None:
        if not self._free(segment):
            self._lent.append(segment)


class Segment:
    """Memory for one body, from `Arena.allocate` until its owner has called `release` and every reader has marked it.

    Attributes:
        view: of just the body's bytes, to be written before it is lent. Not to be kept beyond `release`.
        lent_to: the marks of those who were told of it.
    """

    __slots__ = ("_released", "arena", "block", "length", "lent_to", "use", "view")

    def __init__(self, arena: Arena, block: int, use: int, view: memoryview) -> None:
        self.arena = arena
        self.block = block
        self.use = use
        self.view = view
        self.length = len(view)
        self.lent_to: list[Marks] = []
        self._released = False

    def lend(self, marks: Marks) -> None:
        """The readers behind these marks are about to be told of it."""
        self.lent_to.append(marks)

    def release(self) -> None:
        """The owner is through with it, and lends it no more. Calling it again does nothing."""
        if not self._released:
            self._released = True
            self.arena._done(self)
