"""The verdict on a rank group: gathers what goes wrong for a moment, looks closer at a hang, and names the culprit once."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from minserve.worker.blame import DEATH_GATHER_S, Cause, What, culprit

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

logger = logging.getLogger(__name__)

HANGS = frozenset({What.STALL, What.SILENCE})


class Verdict:
    """Decides once.

    Args:
        exceptions: the causes that the broadcast has gathered.
        look_closer: finds the rank that hangs: what was noticed, the batch → the cause.
        on_judged: called with the culprit.
    """

    def __init__(
        self,
        exceptions: Callable[[], Iterable[Cause]],
        look_closer: Callable[[Cause, int], Coroutine[object, object, Cause]],
        on_judged: Callable[[Cause], None],
    ) -> None:
        self._exceptions = exceptions
        self._look_closer = look_closer
        self._on_judged = on_judged
        self._loop = asyncio.get_running_loop()
        self._causes: list[Cause] = []
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf
        self._closer_look: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def pending(self) -> bool:
        """Whether something is wrong, and it has not been decided yet what."""
        return bool(self._causes)

    def suspect(self, cause: Cause, *, final: bool, gather: float = DEATH_GATHER_S) -> None:
        """Something went wrong. A `final` cause ends the gathering, another one begins it, or cuts it short."""
        if self._closed:
            return
        if cause.what is What.DEATH:  # a rank's exit and the end of its socket come in any order; the exit says more
            told = next((other for other in self._causes if (other.rank, other.what) == (cause.rank, cause.what)), None)
            if told is not None:
                self._causes.remove(told)
                reported = cause.reported or told.reported
                cause = replace(cause if told.exit_code is None else told, at=told.at, reported=reported)
        self._causes.append(cause)
        if final:
            self._judge()
            return
        at = self._loop.time() + gather
        if at < self._due:
            self._due = at
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(at, self._judge)

    def suspect_hang(self, cause: Cause, seq: int) -> None:
        """Nothing went on for too long in a batch. Which rank is to blame is found out first."""
        if not self._closed and self._closer_look is None:
            self._causes.append(cause)
            self._closer_look = self._loop.create_task(self._find(cause, seq))

    def close(self) -> None:
        """Nothing is decided any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._closer_look is not None:
            self._closer_look.cancel()

    async def _find(self, noticed: Cause, seq: int) -> None:
        try:
            found = await self._look_closer(noticed, seq)
        except Exception:  # of what was noticed it is certain that it is wrong
            logger.exception("the ranks could not be looked at")
            found = noticed
        if not self._closed:
            self._causes[self._causes.index(noticed)] = found
            self._judge()

    def _judge(self) -> None:
        if not self._closed:
            self._closed = True
            self._on_judged(culprit([*self._causes, *self._exceptions()]))
