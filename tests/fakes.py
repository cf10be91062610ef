"""Small stand-ins for what unit tests must not have: real time and sockets."""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import selectors
from collections.abc import Callable, Coroutine, Sequence
from typing import ParamSpec

from minserve.wire.frames import FROM_SERVER, Frame, FrameReader
from minserve.wire.messages import Buffer

P = ParamSpec("P")


class FakeHandle:
    """A call that is still to come, unless it is taken back."""

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None

    def run(self) -> None:
        if self.callback is not None:
            self.callback()


class FakeClock:
    """A `dispatch.clock.Clock` whose time passes only when a test says so."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._order = itertools.count()
        self._calls: list[tuple[float, int, FakeHandle]] = []

    def time(self) -> float:
        return self._now

    def call_soon(self, callback: Callable[[], object]) -> FakeHandle:
        return self.call_at(self._now, callback)

    def call_at(self, when: float, callback: Callable[[], object]) -> FakeHandle:
        handle = FakeHandle(callback)
        heapq.heappush(self._calls, (when, next(self._order), handle))
        return handle

    def advance(self, seconds: float = 0.0) -> None:
        """Lets time pass, and runs in order what falls due on the way, also what those calls set up."""
        end = self._now + seconds
        while self._calls and self._calls[0][0] <= end:
            when, _, handle = heapq.heappop(self._calls)
            self._now = max(self._now, when)
            handle.run()
        self._now = end


class MemoryLink:
    """A link to a rank that only remembers the frames written to it, and how many of them could have waited."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.pid = 4000 + rank
        self.has_room = True
        self._reader = FrameReader(2**31, FROM_SERVER)
        self.frames: list[Frame] = []
        self.waited = 0
        self.flushes = 0

    def write(self, pieces: Sequence[Buffer], *, later: bool = False) -> None:
        self.waited += later
        self.frames += feed(self._reader, b"".join(bytes(piece) for piece in pieces))

    def flush(self) -> None:
        self.flushes += 1


def feed(reader: FrameReader, data: bytes) -> list[Frame]:
    """Puts bytes into a reader as a socket would, and returns the frames they complete."""
    frames: list[Frame] = []
    while data:
        buffer = reader.buffer()
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        frames += reader.received(count)
        data = data[count:]
    return frames


class FakeTimeLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits: when nothing is left to do, it is already the time of the next timer."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__(_NoWait(self))

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


class _NoWait(selectors.SelectSelector):
    def __init__(self, loop: FakeTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everyone waits, and nothing is left that could happen"
            self._loop.advance(timeout)
        return ready


def in_fake_time(test: Callable[P, Coroutine[object, object, None]]) -> Callable[P, None]:
    """Runs a test on a FakeTimeLoop, where sleeping takes no time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=FakeTimeLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run
