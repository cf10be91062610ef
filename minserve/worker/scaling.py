"""How many workers a model has, between the fewest and the most: more while requests wait, fewer while workers idle."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minserve.dispatch.clock import Clock

FIRST_PAUSE_S = 5.0  # after a worker that could not be added; twice as long after the next
LONGEST_PAUSE_S = 300.0


class Scale(enum.Enum):
    """One worker more or less."""

    UP = "up"
    DOWN = "down"


class Scaler:
    """Decides when a model gets one worker more or less. It is shown the model about once a second.

    Args:
        fewest, most: workers.
        up_wait: seconds that the oldest request waits before a worker is added.
        down_idle: seconds that a worker has nothing to do before it is taken away.
    """

    def __init__(self, clock: Clock, fewest: int, most: int, up_wait: float, down_idle: float) -> None:
        self._clock = clock
        self.fewest = fewest
        self.most = most
        self._up_wait = up_wait
        self._down_idle = down_idle
        self._pause = FIRST_PAUSE_S
        self._not_before = 0.0

    def look(self, idle: Sequence[float], *, settled: bool, oldest_wait: float) -> Scale | None:
        """What to do.

        Args:
            idle: for each worker that has not been given up, the seconds for which it has had nothing to do.
            settled: whether all of these are READY and none leaves. While one starts, or starts again, requests wait for
                that one: another would not come sooner, and might fail alike.
            oldest_wait: seconds that the oldest request in the queue has waited.
        """
        workers = len(idle)
        if oldest_wait > self._up_wait:
            may = workers < self.most and settled and self._clock.time() >= self._not_before
            return Scale.UP if may else None
        if workers > self.fewest and settled and max(idle) >= self._down_idle:
            return Scale.DOWN
        return None

    def failed(self) -> float:
        """A worker could not be added, or did not live. Returns the seconds before the next may be tried."""
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE_S)
        self._not_before = self._clock.time() + pause
        return pause

    def succeeded(self) -> None:
        """A worker was added."""
        self._pause = FIRST_PAUSE_S
