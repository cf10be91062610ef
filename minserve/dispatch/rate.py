"""How fast a model answers, for the `Retry-After` of those that find its queue full."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minserve.dispatch.clock import Clock

WINDOW_S = 10.0


class Rate:
    """Events per second, the older ones counting ever less (an exponential average over `WINDOW_S`)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._weight = 0.0
        self._at = self._began = clock.time()

    def count(self) -> None:
        """One more."""
        now = self._clock.time()
        self._weight = self._decayed(now) + 1.0
        self._at = now

    def per_second(self) -> float:
        """The rate now; 0 while nothing has been counted."""
        # In the first seconds the average has not seen a whole window yet.
        now = self._clock.time()
        seen = WINDOW_S * -math.expm1(-(now - self._began) / WINDOW_S)
        return self._decayed(now) / max(seen, 1e-3)

    def _decayed(self, now: float) -> float:
        return self._weight * math.exp((self._at - now) / WINDOW_S)
