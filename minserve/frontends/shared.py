"""Two numbers of each frontend process, in memory that all of them have: limits are the server's, not each process's.

Each writes its own and reads all. Two that look in the same microsecond may both find room for one; that is all that a lock
around it would prevent.
"""

from __future__ import annotations

import mmap
import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

_BYTES = 8  # of a number: written and read in one piece


class Shared:
    """The numbers.

    Args:
        descriptor: of the memory. It is closed with this.

    Attributes:
        descriptor: of the memory, for a process that is to have it, too.
        in_flight: bytes of request bodies, by process.
        connections: open ones of clients, by process.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        memory = memoryview(mmap.mmap(descriptor, 0)).cast("q")
        processes = len(memory) // 2
        self.in_flight = memory[:processes]
        self.connections = memory[processes:]

    @classmethod
    def create(cls, processes: int) -> Self:
        """For so many processes, all at 0."""
        descriptor = os.memfd_create("minserve-frontends")
        os.truncate(descriptor, 2 * _BYTES * processes)
        return cls(descriptor)

    def forget(self, process: int) -> None:
        """A process has ended, and nothing of it is left."""
        self.in_flight[process] = self.connections[process] = 0
