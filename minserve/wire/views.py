"""A reader's side of an arena: bodies looked at where they lie, and kept from being overwritten as long as anyone looks."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref

from minserve.errors import WireError
from minserve.wire.arena import BLOCK_BYTES

_MADV_DONTFORK = 10  # madvise(2)


class Views:
    """Read-only views of the bodies in an arena.

    A use is marked as over when the last object that was made from its view is gone: slices, a tensor by
    `torch.frombuffer`, an array by `numpy.frombuffer` all hold on to it. Until then the owner gives its memory to nobody.

    The mapping cannot be written to, and a process that this one forks does not have it: there nothing would hold on to a
    body, and a late look could be at another one.

    Args:
        descriptor: of the arena's memory. It can be closed afterwards.
        row: this reader's of the arena's marks.

    Attributes:
        held: bytes of the views that are in use.
    """

    def __init__(self, descriptor: int, row: memoryview) -> None:
        self._size = os.fstat(descriptor).st_size
        self._address = _map(descriptor, self._size)
        self._row = row
        self._pid = os.getpid()
        self.held = 0
        # Every view holds on to this object by its finalizer, so that nothing is unmapped under one.
        weakref.finalize(self, _libc().munmap, self._address, self._size).atexit = False

    def view(self, block: int, use: int, length: int) -> memoryview:
        """A body's bytes, read-only.

        Raises:
            WireError: there is no such place in the arena.
        """
        memory = self._memory(block, length)
        self.held += length
        weakref.finalize(memory, self._over, block, use, length).atexit = False
        return memoryview(memory).cast("B").toreadonly()[:length]  # cast: items of ctypes' own "<B" cannot be read

    def copy(self, block: int, use: int, length: int) -> bytearray:
        """A copy of a body, whose use is over at once.

        Raises:
            WireError: there is no such place in the arena.
        """
        copy = bytearray(memoryview(self._memory(block, length))[:length])
        self.skip(block, use)
        return copy

    def skip(self, block: int, use: int) -> None:
        """This reader does not want a body."""
        self._row[block] = use

    def _memory(self, block: int, length: int) -> ctypes.Array[ctypes.c_ubyte]:
        count = -(-length // BLOCK_BYTES)
        if block < 0 or length < 1 or (block + count) * BLOCK_BYTES > self._size:
            raise WireError(f"a body of {length} bytes at block {block} is not in the arena of {self._size} bytes")
        return _array_type(count).from_address(self._address + block * BLOCK_BYTES)

    def _over(self, block: int, use: int, length: int) -> None:
        if os.getpid() == self._pid:  # a forked child drops its copies of the objects, too
            self.held -= length
            self._row[block] = use


@functools.cache
def _array_type(blocks: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    """ctypes makes a class for each length. Whole blocks are few different ones; one for each body would be litter."""
    return ctypes.c_ubyte * (blocks * BLOCK_BYTES)


@functools.cache
def _libc() -> ctypes.CDLL:
    """mmap itself: Python's does not tell the address of a mapping that is read-only."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _map(descriptor: int, size: int) -> int:
    address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "cannot map the arena")
    assert isinstance(address, int)
    _libc().madvise(address, size, _MADV_DONTFORK)
    return address
