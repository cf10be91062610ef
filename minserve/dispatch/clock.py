"""Time as the dispatcher and the workers see it: a running event loop, or a fake one in tests."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Handle(Protocol):
    """A call that is still to come."""

    def cancel(self) -> None:
        """Takes it back."""


class Clock(Protocol):
    """The part of an event loop that deals with time. All times are seconds on its monotonic clock."""

    def time(self) -> float:
        """Now."""

    def call_soon(self, callback: Callable[[], object]) -> Handle:
        """Calls back once what is running has finished."""

    def call_at(self, when: float, callback: Callable[[], object]) -> Handle:
        """Calls back at a time."""


class Alarm:
    """One timer for many due times: it is set to the earliest, and whoever it wakes looks up what is due and sets it anew.

    A deadline that is met in time, which is nearly every one, so costs a comparison instead of a timer set and cancelled.
    """

    def __init__(self, clock: Clock, callback: Callable[[], object]) -> None:
        self._clock = clock
        self._callback = callback
        self._when = math.inf
        self._handle: Handle | None = None

    def at(self, when: float) -> None:
        """Rings at `when` or earlier. A later time than the one already set changes nothing."""
        if when >= self._when:
            return
        self.stop()
        self._when = when
        self._handle = self._clock.call_at(when, self._ring)

    def stop(self) -> None:
        """Does not ring until it is set again."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._when = math.inf

    def _ring(self) -> None:
        self._handle = None
        self._when = math.inf
        self._callback()
