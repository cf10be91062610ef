"""Records the batches of one worker for whoever reads them, over its restarts. It never holds the worker up.

There is none until somebody asks for one: until then a batch costs a look whether there is. What is not read in time is
dropped, and the recording says how much. Encoded at once, on the loop: the bodies are the requests' own memory, gone with
their answers.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from minserve.wire.recording import MAGIC, Ended, Gap, Sent, Stopped, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from minserve.dispatch.request import Request
    from minserve.wire.recording import Header

ROOM_BYTES = 16 * 1024 * 1024


class Recorder:
    """One recording in the making. It has one reader.

    Args:
        header: its `bodies` says whether the batches' bodies are kept.
        room: bytes that may wait for the reader. One batch goes whatever its size when nothing waits.
    """

    def __init__(self, header: Header, room: int = ROOM_BYTES, now: Callable[[], float] = time.time) -> None:
        self._header = header
        self._room = room
        self._now = now
        self._records = deque([MAGIC + encode(header)])
        self._waiting = len(self._records[0])
        self._dropped = 0
        self._incarnation = ""
        self._open: set[int] = set()  # batches that are recorded and not over
        self._closed = False
        self._changed = asyncio.Event()
        self._changed.set()

    # ── what the worker tells ──

    def begin(self, incarnation: str) -> None:
        """The batches to come are those of another life of the worker."""
        self._incarnation = incarnation
        self._open.clear()

    def batch(self, seq: int, requests: Sequence[Request]) -> None:
        """A batch was sent to all ranks."""
        size = 0
        bodies: tuple[bytes, ...] | None = None
        if self._header.bodies:
            size = sum(len(body) for request in requests for body in request.bodies)
            if self._full(size):
                self._dropped += 1
                return
            bodies = tuple(bytes(body) for request in requests for body in request.bodies)
        metas = tuple(request.meta for request in requests)
        record = encode(Sent(self._incarnation, seq, self._now(), metas, bodies))
        if self._full(len(record)):
            self._dropped += 1
            return
        if self._dropped:
            self._put(encode(Gap(self._dropped)))
            self._dropped = 0
        self._open.add(seq)
        self._put(record)

    def ended(self, seq: int, error: str = "") -> None:
        """A batch is over, with answers or with an error for its clients."""
        if seq in self._open:
            self._open.remove(seq)
            self._put(encode(Ended(self._incarnation, seq, self._now(), error)))  # small, and one a batch: always room

    def close(self, reason: str) -> None:
        """Nothing more will come. What waits is still read."""
        if not self._closed:
            if self._dropped:
                self._put(encode(Gap(self._dropped)))
            self._put(encode(Stopped(reason)))
            self._closed = True

    # ── the reader ──

    async def next(self) -> bytes | None:
        """What has come since the last call, as soon as there is something. None at the end."""
        if not self._records and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        data = b"".join(self._records)
        self._records.clear()
        self._waiting = 0
        return data or None

    # ── inside ──

    def _full(self, size: int) -> bool:
        return bool(self._records) and self._waiting + size > self._room

    def _put(self, record: bytes) -> None:
        if not self._closed:
            self._records.append(record)
            self._waiting += len(record)
            self._changed.set()
