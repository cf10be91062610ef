"""Metrics as numbers, and as the text that Prometheus reads.

Counters keep the names they are declared with: TorchServe's client library is older than the rule that they end in
`_total`, and so are the queries that people have. Its text form, format 0.0.4, is matched to the byte (torchserve.md 3.1).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from minserve.telemetry.declarations import Declaration, Kind

Labels = tuple[tuple[str, str], ...]
"""Names and values, in the order in which they are written."""

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)  # its library's own


class Series(Protocol):
    """The values of a metric with one set of labels."""

    def record(self, value: float, request_ids: str = "") -> None:
        """One more value: what a counter grows by, what a gauge is set to, what a histogram observes."""


class Nothing:
    """The series of a metric that nobody has declared."""

    def record(self, value: float, request_ids: str = "") -> None:
        """Forgets the value."""


class Counter:
    """What grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def record(self, value: float, request_ids: str = "") -> None:
        """Grows by `value`."""
        self.value += value

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """What follows the name, more labels, and the value, of each line."""
        yield "", (), self.value


class Gauge(Counter):
    """What goes up and down."""

    __slots__ = ()

    def record(self, value: float, request_ids: str = "") -> None:
        """Is `value` from now on."""
        self.value = value


class Histogram:
    """How many values were how large.

    Args:
        bounds: the largest value that counts into each bucket, ascending; one more bucket has no bound.
    """

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float] = BOUNDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def record(self, value: float, request_ids: str = "") -> None:
        """Observes one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def record_all(self, values: Sequence[float]) -> None:
        """Observes each of these values."""
        bounds, counts = self._bounds, self._counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self.total += sum(values)

    def record_many(self, value: float, count: int) -> None:
        """Observes one value so many times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self.total += value * count

    def add(self, counts: Sequence[int], total: float) -> None:
        """Observes what another one of the same bounds has given away, see `take`."""
        self._counts = [ours + theirs for ours, theirs in zip(self._counts, counts, strict=True)]
        self.total += total

    def take(self) -> tuple[tuple[int, ...], float]:
        """How many values fell into each bucket, and their sum; it begins anew then."""
        counts, total = tuple(self._counts), self.total
        self._counts, self.total = [0] * len(counts), 0.0
        return counts, total

    def buckets(self) -> list[tuple[str, int]]:
        """Each bound, as text, with how many values were no larger."""
        seen = 0
        buckets = []
        for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
            seen += count
            buckets.append((number(bound), seen))
        return buckets

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """What follows the name, more labels, and the value, of each line."""
        buckets = self.buckets()
        for bound, seen in buckets:
            yield "_bucket", (("le", bound),), float(seen)
        yield "_count", (), float(buckets[-1][1])
        yield "_sum", (), self.total


_KINDS: dict[Kind, Callable[[], Counter | Histogram]] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class Family:
    """All series of one metric."""

    def __init__(self, declaration: Declaration) -> None:
        self.declaration = declaration
        self._series: dict[Labels, Counter | Histogram] = {}

    def has(self, labels: Labels) -> bool:
        """Whether there is a series of these labels already."""
        return labels in self._series

    def series(self, labels: Labels) -> Series:
        """The series of these labels; made if it is not there."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _KINDS[self.declaration.kind]()
        return series

    def lines(self, names: Collection[str]) -> Iterator[str]:
        """The text form.

        Args:
            names: of the samples that are wanted, and with none of them the metric is left out; empty: all are.
        """
        name, kind = self.declaration.name, self.declaration.kind
        lines = [
            f"{name}{suffix}{_braced((*labels, *more))} {number(value)}\n"
            for labels, series in self._series.items()
            for suffix, more, value in series.samples()
            if not names or f"{name}{suffix}" in names
        ]
        if lines or not names:
            yield f"# HELP {name} Torchserve prometheus {kind} metric with unit: {_escaped(self.declaration.unit)}\n"
            yield f"# TYPE {name} {kind}\n"
            yield from lines


def number(value: float) -> str:
    """A number as Prometheus writes it."""
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(float(value))


def _braced(labels: Labels) -> str:
    """With a comma behind each label, also the last."""
    if not labels:
        return ""
    values = ((name, _escaped(value).replace('"', '\\"')) for name, value in labels)
    return "{" + "".join(f'{name}="{value}",' for name, value in values) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
