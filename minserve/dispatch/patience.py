"""How long a batch that is not full waits for company while a worker has a place for it.

With every place taken nothing is decided here: batches fill by themselves until one comes free. With a place, let `n`
requests wait, the next one be expected in `g` seconds, and a batch take `S`. A batch that goes now makes the next request
wait for the rest of it, `S - g`. A batch that waits for that request makes `n` requests wait `g` each. In sum over all
n + 1 the second is shorter if

    n·g < S - g,  that is  (n + 1)·g < S

and saves a batch as well. So requests that come seldom never wait, and the faster they come the fuller batches get. Clients
that wait for their answers before they ask again stop coming once all of them are in the batch: when nobody has come for
2·g, the batch goes. `maxBatchDelay` bounds it all: arrivals further apart than that cannot meet, and count as none.

Where sending now takes nothing from the next request, because another place is free for it, no batch waits; nor does one
while `g` or `S` is not known.
"""

from __future__ import annotations

NEWEST = 0.2  # share of the last gap in the expected one
PATIENT = 2  # gaps without an arrival after which none is expected any more


class Patience:
    """Decides for one queue. All times are seconds on the same clock.

    Args:
        max_delay: the longest that a request may wait for company; 0: none waits.
        adaptive: False: a batch that is not full always waits that long, as TorchServe's do.
    """

    def __init__(self, max_delay: float, *, adaptive: bool) -> None:
        self.max_delay = max_delay
        self._adaptive = adaptive
        self._gap: float | None = None
        self._last = 0.0

    def arrived(self, now: float) -> None:
        """One more request has come."""
        gap, self._last = now - self._last, now
        if gap > self.max_delay:
            self._gap = None
        else:
            self._gap = gap if self._gap is None else self._gap + (gap - self._gap) * NEWEST

    def until(self, waiting: int, oldest: float, batch_seconds: float | None, *, last_place: bool) -> float:
        """The time until which the batch waits if nobody comes; a time that has passed: it goes now.

        Args:
            waiting: how many requests are in it so far.
            oldest: when the first of them came.
            batch_seconds: how long the next request waits for a place if this batch goes now; None: nobody knows.
            last_place: there is none for the next request then.
        """
        window = oldest + self.max_delay
        if not self._adaptive:
            return window
        if not last_place or self._gap is None or batch_seconds is None or (waiting + 1) * self._gap >= batch_seconds:
            return 0.0
        return min(window, self._last + PATIENT * self._gap)
