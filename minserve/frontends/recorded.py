"""What is measured in a frontend process, until it is told to the server."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from minserve.frontends.messages import Recorded, Spent
from minserve.telemetry.meters import STAGE_BOUNDS
from minserve.telemetry.series import Histogram
from minserve.wire.frames import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from minserve.frontends.channel import Channel

TELL_S = 0.5


class Measured:
    """Counts answers and times. The server hears of them twice a second, and whenever it asks.

    Not with each request: the server's time is what all these processes share.

    Attributes:
        in_flight: nobody asks for it here.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._answers: Counter[int] = Counter()
        self._spent: dict[tuple[str | None, str], Histogram] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.in_flight: Callable[[], int] = lambda: 0

    def answered(self, status: int) -> None:
        """Counts an answer."""
        self._answers[status] += 1
        if self._timer is None:
            self._timer = self._loop.call_later(TELL_S, self.tell)

    def spent(self, model: str | None, version: str) -> Histogram:
        """Seconds that requests to a model spend here."""
        key = model, version
        if key not in self._spent:
            self._spent[key] = Histogram(STAGE_BOUNDS)
        return self._spent[key]

    def tell(self, number: int = 0) -> None:
        """Tells the server all of it.

        Args:
            number: of its question; 0: it has not asked.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        spent = tuple(Spent(*key, *histogram.take()) for key, histogram in self._spent.items() if histogram.total)
        self._channel.send(Kind.RECORDED, number, Recorded(dict(self._answers), spent))
        self._answers.clear()
