"""How long the ranks may take over a batch, and that a batch gets to them at all."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from minserve.dispatch.clock import Alarm
from minserve.worker.blame import Cause, What

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from minserve.dispatch.clock import Clock
    from minserve.worker.outstanding import Limits, Outstanding, RankLink


class TimeLimits:
    """Watches the time of one worker's batches.

    Args:
        outstanding: the batches under way, by seq, oldest first. The one that `begin` gets is not yet among them.
        on_silence: a limit has passed; of the cause the rank is a guess, and the seq that of the batch that does not end;
            0: none is under way, and none gets through.
        on_overdue: one of several batches that are worked on beside each other takes too long.
    """

    def __init__(
        self,
        clock: Clock,
        links: Sequence[RankLink],
        limits: Limits,
        outstanding: Mapping[int, Outstanding],
        on_silence: Callable[[Cause, int], None],
        on_overdue: Callable[[Outstanding], None],
    ) -> None:
        self._clock = clock
        self._links = links
        self._limits = limits
        self._outstanding = outstanding
        self._on_silence = on_silence
        self._on_overdue = on_overdue
        self._alarm = Alarm(clock, self._look)
        self._served = False  # a batch that is no probe is over
        self._waiting: set[int] = set()  # batches that wait for their clients, and with each perhaps all others
        self._held = False  # for that reason no limit counts
        self._crowded_until = math.inf  # how long it is borne that a link has no room

    def stop(self) -> None:
        """The group is gone."""
        self._alarm.stop()

    def crowded(self, crowded: bool) -> None:
        """Whether some link has no room for another batch."""
        if not crowded:
            self._crowded_until = math.inf
        elif self._crowded_until == math.inf:
            self._crowded_until = self._clock.time() + self._limits.response_timeout
            self._alarm.at(self._crowded_until)

    def begin(self, batch: Outstanding) -> None:
        """A batch goes out. Behind others it counts from when it becomes the oldest, see `finished`."""
        batch.limit = self._limit()
        alone = not self._outstanding or self._limits.any_order
        self._set(batch, self._clock.time() + batch.limit if alone else math.inf)

    def finished(self, batch: Outstanding) -> None:
        """A batch is over, and gone from those under way."""
        self._served = self._served or bool(batch.requests)
        self._waiting.discard(batch.seq)
        if self._limits.any_order:
            return
        oldest = next(iter(self._outstanding.values()), None)
        moved = oldest is not None and oldest.seq > batch.seq  # in a pipeline a later one may be over first
        if oldest is not None and moved:
            oldest.limit = self._limit()
        self._recount(moved=moved)

    def stepped(self, batch: Outstanding) -> None:
        """A stream goes on, or has to wait for its clients, which counts for no limit."""
        if self._limits.any_order:
            self._set(batch, math.inf if _waits(batch) else self._clock.time() + batch.limit)
        else:
            (self._waiting.add if _waits(batch) else self._waiting.discard)(batch.seq)
            self._recount(moved=batch is next(iter(self._outstanding.values())))

    def _recount(self, *, moved: bool) -> None:
        """The oldest batch has its limit anew if it has `moved` on, or if those that stood still may go on."""
        held, self._held = self._held, bool(self._waiting)
        if self._outstanding and (moved or held != self._held):
            oldest = next(iter(self._outstanding.values()))
            self._set(oldest, math.inf if self._held else self._clock.time() + oldest.limit)

    def cancelled(self, batch: Outstanding) -> None:
        """A batch that is worked on beside others is to end."""
        self._set(batch, self._clock.time() + self._limits.response_timeout)  # by then its task must have ended

    def _limit(self) -> float:
        return self._limits.response_timeout if self._served else self._limits.first_batch_timeout

    def _set(self, batch: Outstanding, due: float) -> None:
        batch.due = due
        self._alarm.at(due)

    def _look(self) -> None:
        now = self._clock.time()
        if self._crowded_until <= now and self._outstanding:  # rank 0 is at work, too: the batch's own limit governs
            self._crowded_until = now + self._limits.response_timeout
        if self._crowded_until <= now:
            link = next(link for link in self._links if not link.has_room)
            text = f"has taken no batch for {self._limits.response_timeout:g} s"
            self._on_silence(Cause(What.SILENCE, link.rank, link.pid, text, now), 0)
            return
        self._alarm.at(self._crowded_until)
        for batch in list(self._outstanding.values()):
            if batch.due <= now and self._limits.any_order and batch.requests and not batch.cancelled:
                self._on_overdue(batch)
            if batch.due <= now:
                self._on_silence(self._silent(batch, now), batch.seq)
                return
            self._alarm.at(batch.due)

    def _silent(self, batch: Outstanding, now: float) -> Cause:
        link = self._links[0]
        if batch.held is not None:  # rank 0 has answered; with replyAfter: all it is another that is behind
            link = next(link for link in self._links if link.rank not in batch.done)
        text = f"did not finish batch {batch.seq} within {batch.limit:g} s"
        return Cause(What.SILENCE, link.rank, link.pid, text, now)


def _waits(batch: Outstanding) -> bool:
    return batch.waits_for_grant and not batch.cancelled
