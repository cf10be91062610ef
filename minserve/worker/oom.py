"""Whether the kernel's out-of-memory killer has been at work: it kills with SIGKILL, as anybody does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.dispatch.clock import Alarm
from minserve.worker.processes import oom_kills

if TYPE_CHECKING:
    from collections.abc import Callable

    from minserve.dispatch.clock import Clock

LOOK_S = 10.0


class OutOfMemory:
    """Compares the control group's count of such kills with what it was a little while ago.

    Not with what it was when the rank group started: a kill in another group days ago must not explain today's SIGKILL. Nor
    with what it was a moment ago: a process with much memory takes its time to end after the count has risen.
    """

    def __init__(self, clock: Clock, count: Callable[[], int | None] = oom_kills) -> None:
        self._clock = clock
        self._count = count
        self._before = self._latest = count()
        self._alarm = Alarm(clock, self._look)
        if self._latest is not None:  # else the kernel does not count here, and there is nothing to look at
            self._alarm.at(clock.time() + LOOK_S)

    def lately(self) -> bool:
        """Whether it has killed in the last 10 to 20 seconds."""
        now = self._count()
        return now is not None and self._before is not None and now > self._before

    def close(self) -> None:
        """Looks no more."""
        self._alarm.stop()

    def _look(self) -> None:
        self._before, self._latest = self._latest, self._count()
        self._alarm.at(self._clock.time() + LOOK_S)
