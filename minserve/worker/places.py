"""How many batches a worker may have under way at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minserve.dispatch.clock import Clock

# From rank 0's answer to the next batch in its hands, when that batch has to be sent first: a wake-up of the server, its
# own work, and a wake-up of the ranks.
WAY_S = 0.0002
SLOW_S = 0.01  # beside a batch this long the way is nothing
MOST = 16
FORGET = 0.05  # how fast a long batch is forgotten, of the difference with each batch


class Places:
    """Counts the places of one worker.

    Ranks run one batch after the other, however many they have been sent, so what a second place saves is the way: the next
    batch already lies in the ranks' sockets when they are through with the last. It costs that the batch was cut earlier,
    and a request in it can no longer expire, leave, or go to another worker that becomes idle first. So there are as many
    as fill the time of the way, `1 + WAY_S / seconds` for batches of that length, and one alone beside a batch of `SLOW_S`
    or more. A long batch counts at once and is forgotten slowly: handlers that are slow now and then get one place. Behind
    a batch that takes long at this moment nothing more is sent.

    A batch that could be fuller goes ahead of nothing: until a place is free without it, it fills.

    Args:
        fixed: exactly so many; None: as above.
    """

    def __init__(self, clock: Clock, fixed: int | None) -> None:
        self._clock = clock
        self._automatic = fixed is None
        self._seconds = math.inf
        self._most = 1 if fixed is None else fixed
        self._moved_at = 0.0  # when the oldest batch under way became the oldest

    def allow(self, under_way: int, *, full: bool) -> bool:
        """Whether one more batch may be sent.

        Args:
            under_way: batches that were sent and are not over.
            full: it has as many requests as a batch may have.
        """
        if not under_way:
            return True
        if under_way >= self._most:
            return False
        return not self._automatic or (full and self._clock.time() - self._moved_at < SLOW_S)

    def fix(self, places: int) -> None:
        """From now on it is exactly so many: the ranks can have that many at work at once."""
        self._automatic, self._most = False, places

    def began(self) -> None:
        """A batch was sent while none was under way."""
        self._moved_at = self._clock.time()

    def finished(self, seconds: float | None) -> None:
        """A batch is over, for which rank 0 was so long in `handle`; None: it has not answered."""
        self._moved_at = self._clock.time()
        if self._automatic and seconds is not None:
            last = seconds if self._seconds == math.inf else self._seconds
            self._seconds = max(seconds, last + (seconds - last) * FORGET)
            self._most = 1 if self._seconds >= SLOW_S else min(MOST, 1 + math.ceil(WAY_S / max(self._seconds, 1e-6)))
