"""Metrics as log lines: `Name.Unit:value|#Label:value,...|#hostname:H,timestamp:T` (torchserve.md 3.3)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from minserve.telemetry.declarations import Declaration
    from minserve.telemetry.series import Labels, Series


class Logged:
    """A metric whose values are log lines.

    Args:
        now: seconds since the epoch, for values that do not bring a time of their own.
    """

    def __init__(self, declaration: Declaration, log: logging.Logger, now: Callable[[], float]) -> None:
        self.declaration = declaration
        self._log = log
        self._now = now

    def series(self, labels: Labels) -> Series:
        """Writes a line for each value."""
        return _LoggedSeries(self, labels)

    def log(self, labels: Labels, value: float, request_ids: str = "", at: float | None = None) -> None:
        """Writes a line. The host's name is the last label."""
        if not self._log.isEnabledFor(logging.INFO):
            return
        one = self.declaration
        *others, (_, hostname) = labels
        pairs = ",".join(f"{name}:{given}" for name, given in others)
        ids = f",requestID:{request_ids}" if request_ids else ""
        when = int(self._now() if at is None else at)
        line = f"{one.name}.{one.unit}:{round(float(value), 6)}|#{pairs}|#hostname:{hostname}{ids},timestamp:{when}"
        self._log.info("%s", _one_line(line))


class _LoggedSeries:
    __slots__ = ("_labels", "_metric")

    def __init__(self, metric: Logged, labels: Labels) -> None:
        self._metric = metric
        self._labels = labels

    def record(self, value: float, request_ids: str = "") -> None:
        self._metric.log(self._labels, value, request_ids)


def _one_line(text: str) -> str:
    """A label with a line break could otherwise look like another metric."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
