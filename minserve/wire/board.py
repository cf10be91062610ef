"""The board: a small mapped file in which every rank of a worker shows how far it is, also when it answers nothing.

A rank writes its own slot and nothing else, the server only reads. A slot is 64 bytes: eight native u64, each written whole:

    0 heartbeat     grows while a small thread of the rank gets to run Python
    1 received      seq of the last batch it has taken up
    2 finished      seq of the last batch it is through with
    3 stream        seq of the last batch in which it has counted a step of a stream
    4 step          that step
    5 collectives   how many it has issued in its life, as of the last heartbeat
    6, 7            not used

Nothing here waits or fails when the other end is gone: a mapping outlives its file and its writers.
"""

from __future__ import annotations

import mmap
import os
import signal
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

HEARTBEAT_S = 0.25
# Asks a rank for its Python stacks (faulthandler, which also works while C code holds the GIL). A real-time signal: handlers
# and libraries have their own uses for SIGUSR1 and SIGUSR2.
STACK_SIGNAL = signal.SIGRTMIN + 7

_WORDS = 8
_SLOT_BYTES = 8 * _WORDS
_HEARTBEAT, _RECEIVED, _FINISHED, _STREAM, _STEP, _COLLECTIVES = range(6)


class Vitals(NamedTuple):
    """One rank's slot, as the server reads it."""

    heartbeat: int = 0
    received: int = 0
    finished: int = 0
    stream: int = 0
    step: int = 0
    collectives: int = 0

    def step_of(self, seq: int) -> int:
        """The steps counted in batch `seq`."""
        return self.step if self.stream == seq else 0


class Board:
    """The server's side: creates the file and reads the slots."""

    def __init__(self, path: Path, ranks: int) -> None:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, ranks * _SLOT_BYTES)
            self._map = mmap.mmap(file, ranks * _SLOT_BYTES)
        finally:
            os.close(file)
        self._words = memoryview(self._map).cast("Q")

    def read(self, rank: int) -> Vitals:
        """What a rank shows. The words are read one after another: a rank may move on in between, never back."""
        start = rank * _WORDS
        return Vitals(*self._words[start : start + len(Vitals._fields)])

    def close(self) -> None:
        """Lets go of the mapping."""
        self._words.release()
        self._map.close()


class Slot:
    """A rank's side: its own slot. The writes cost a store each, so they are made for every batch and step."""

    def __init__(self, path: Path, rank: int) -> None:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            whole = mmap.mmap(file, 0)
        finally:
            os.close(file)
        self._words = memoryview(whole).cast("Q")[rank * _WORDS : (rank + 1) * _WORDS]

    def beat(self, collectives: int) -> None:
        """One heartbeat."""
        self._words[_COLLECTIVES] = collectives
        self._words[_HEARTBEAT] += 1

    def received(self, seq: int) -> None:
        """A batch is taken up."""
        self._words[_RECEIVED] = seq

    def finished(self, seq: int) -> None:
        """A batch is over on this rank, however it ended."""
        self._words[_FINISHED] = seq

    def stepped(self, seq: int, step: int) -> None:
        """A step of a stream is counted."""
        if self._words[_STREAM] != seq:
            self._words[_STEP] = 0  # first: the server must not take the last stream's step for this one's
            self._words[_STREAM] = seq
        self._words[_STEP] = step
