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
        self._weight = self._decayed() + 1.0
        self._at = self._clock.time()

    def per_second(self) -> float:
        """The rate now; 0 while nothing has been counted."""
        # In the first seconds the average has not seen a whole window yet.
        seen = WINDOW_S * -math.expm1(-(self._clock.time() - self._began) / WINDOW_S)
        return self._decayed() / max(seen, 1e-3)

    def _decayed(self) -> float:
        return self._weight * math.exp((self._at - self._clock.time()) / WINDOW_S)
