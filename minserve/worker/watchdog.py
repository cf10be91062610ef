"""Looks at the ranks when they say nothing: the heartbeat, the progress after rank 0's answer, and whether they are idle.

All that is seen here costs a batch nothing: a look reads a few words of shared memory, twice a second.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Protocol

from minserve.dispatch.clock import Alarm
from minserve.worker.blame import Cause, What
from minserve.worker.processes import STOPPED, process_state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from minserve.dispatch.clock import Clock
    from minserve.wire.board import Vitals
    from minserve.worker.outstanding import Limits, RankLink

LOOK_S = 0.5


class Watched(Protocol):
    """What the watchdog needs of the broadcast."""

    batches_done: int
    first_seq: int

    @property
    def busy(self) -> bool:
        """Whether a batch or a probe is under way."""

    @property
    def replied(self) -> int:
        """Seq of the last batch that rank 0 is through with."""

    def look(self) -> None:
        """Half a second has passed: streams whose clients have left are cancelled."""

    def has_place(self) -> bool:
        """Whether a batch may be sent now."""

    def probe(self) -> None:
        """Sends the handler's probe to all ranks."""


class Watchdog:
    """Watches the ranks of one worker from when they serve.

    Args:
        read: a rank's slot on the board.
        on_suspect: called with what was noticed and the batch that it is about.
        probe_interval: seconds of idling after which a probe is sent; 0 is never.
        state: a process's state, one letter.

    Attributes:
        silent: seconds since each rank's last heartbeat was seen, by rank.
    """

    def __init__(
        self,
        clock: Clock,
        links: Sequence[RankLink],
        broadcast: Watched,
        limits: Limits,
        read: Callable[[int], Vitals],
        on_suspect: Callable[[Cause, int], None],
        probe_interval: float = 0.0,
        state: Callable[[int], str] = process_state,
    ) -> None:
        self._clock = clock
        self._links = links
        self._broadcast = broadcast
        self._limits = limits
        self._read = read
        self._on_suspect = on_suspect
        self._probe_interval = probe_interval
        self._state = state
        self._alarm = Alarm(clock, self._look)
        self._looked_at = clock.time()
        self._heartbeats = [0] * len(links)
        self._compiles = [False] * len(links)
        self.silent = [0.0] * len(links)
        # When rank 0 was seen to be through with which batch, oldest first: until every rank is.
        self._trail: deque[tuple[float, int]] = deque()
        self._done = 0
        self._idle_since = clock.time()
        self._alarm.at(clock.time() + LOOK_S)

    def stop(self) -> None:
        """Looks no more."""
        self._alarm.stop()

    def _look(self) -> None:
        now = self._clock.time()
        # Not more than two looks' worth: when the server itself or the whole machine was stopped, no rank is to blame.
        passed = min(now - self._looked_at, 2 * LOOK_S)
        self._looked_at = now
        self._alarm.at(now + LOOK_S)
        vitals = [self._read(link.rank) for link in self._links]
        self._broadcast.look()
        suspect = self._stalled(vitals, passed, now) or self._left_behind(vitals, now)
        if suspect is not None:
            self._alarm.stop()
            self._on_suspect(*suspect)
            return
        self._probe_if_idle(now)

    def _stalled(self, vitals: Sequence[Vitals], passed: float, now: float) -> tuple[Cause, int] | None:
        """A rank without a heartbeat for stallTimeout.

        In its first batch a rank may compile, and hold the GIL for as long as that takes; it is not stopped then.
        """
        limit = self._limits.stall_timeout or math.inf
        for index, vital in enumerate(vitals):
            compiled, self._compiles[index] = self._compiles[index], vital.finished < self._broadcast.first_seq
            if vital.heartbeat != self._heartbeats[index] or (compiled and not self._compiles[index]):
                self._heartbeats[index], self.silent[index] = vital.heartbeat, 0.0
            else:
                self.silent[index] += passed
        for index, (link, silent) in enumerate(zip(self._links, self.silent, strict=True)):
            if silent >= limit and (not self._compiles[index] or self._state(link.pid) in STOPPED):
                text = f"gave no sign of life for stallTimeout ({limit:g} s)"
                return Cause(What.STALL, link.rank, link.pid, text, now), self._broadcast.replied + self._broadcast.busy
        return None

    def _left_behind(self, vitals: Sequence[Vitals], now: float) -> tuple[Cause, int] | None:
        """A rank that has not finished a batch responseTimeout after rank 0 has."""
        replied = self._broadcast.replied
        if replied and (not self._trail or self._trail[-1][1] < replied):
            self._trail.append((now, replied))
        finished = min(vital.finished for vital in vitals)
        while self._trail and self._trail[0][1] <= finished:
            self._trail.popleft()
        compiles = finished < self._broadcast.first_seq  # on each rank by itself
        limit = self._limits.first_batch_timeout if compiles else self._limits.response_timeout
        if not self._trail or now - self._trail[0][0] < limit:
            return None
        link, vital = min(zip(self._links, vitals, strict=True), key=lambda pair: pair[1].finished)
        text = f"did not finish batch {vital.finished + 1} within {limit:g} s of rank 0's answer"
        return Cause(What.SILENCE, link.rank, link.pid, text, now), vital.finished + 1

    def _probe_if_idle(self, now: float) -> None:
        if not self._probe_interval:
            return
        if self._broadcast.busy or self._broadcast.batches_done != self._done:
            self._done, self._idle_since = self._broadcast.batches_done, now
        elif now - self._idle_since >= self._probe_interval and self._broadcast.has_place():
            self._idle_since = now
            self._broadcast.probe()
