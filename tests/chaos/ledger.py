"""The book of a run: what was asked, what came of it, how long each fault took to be seen and mended, and every breach."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

BETWEEN = "(between faults)"


@dataclass(slots=True)
class Row:
    """What is known of one kind of fault. Times are seconds from the moment of the fault.

    Attributes:
        limits: within what time it must be seen; accept and start have limits of each model's own.
        over: how often it was seen later than that.
        vague: how often a death was told as an end of the rank whose exit status nobody could read in time.
        refused: requests answered with an error that was due; `undue`: with another one.
        left: requests whose client itself has gone.
    """

    name: str
    count: int = 0
    restarts: int = 0
    detected: list[float] = field(default_factory=list)
    limits: set[float] = field(default_factory=set)
    over: int = 0
    vague: int = 0
    recovered: list[float] = field(default_factory=list)
    asked: int = 0
    right: int = 0
    refused: int = 0
    undue: int = 0
    left: int = 0
    wrong: int = 0

    @property
    def answered(self) -> int:
        return self.right + self.refused + self.undue + self.left + self.wrong


@dataclass(frozen=True, slots=True)
class Breach:
    """Something that must not happen."""

    fault: str
    model: str
    text: str


@dataclass(slots=True)
class Window:
    """A stretch of time in which a model's requests may fail, and how: that of one fault.

    Attributes:
        come_again: whether those that fail must be told when to try again.
    """

    row: Row
    statuses: frozenset[int]
    says: re.Pattern[str]
    may_break_streams: bool
    come_again: bool

    def allows(self, status: int, message: str) -> bool:
        """Whether this error is the one that this fault brings about."""
        return status in self.statuses and self.says.search(message) is not None


NOTHING = re.compile(r"(?!)")


class Ledger:
    """Filled by the load and by the faults."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.breaches: list[Breach] = []
        self._windows: dict[str, list[Window]] = {}

    def row(self, name: str) -> Row:
        return self.rows.setdefault(name, Row(name))

    def breach(self, fault: str, model: str, text: str) -> None:
        self.breaches.append(Breach(fault, model, text))

    @contextmanager
    def window(
        self,
        model: str,
        row: Row,
        statuses: frozenset[int],
        says: re.Pattern[str],
        *,
        breaks_streams: bool = False,
        come_again: bool = False,
    ) -> Iterator[Window]:
        """Until its end this model's requests may fail in this way."""
        window = Window(row, statuses, says, breaks_streams, come_again)
        self._windows.setdefault(model, []).append(window)
        try:
            yield window
        finally:
            self._windows[model].remove(window)

    def windows(self, model: str) -> tuple[Window, ...]:
        """Those that are open now."""
        return tuple(self._windows.get(model, ()))
