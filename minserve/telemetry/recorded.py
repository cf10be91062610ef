"""What handlers record on the ranks: which of it is taken in, and under which labels.

A handler can record anything, as often as it likes. So whatever it makes here has a bound, and nothing of it may spoil what
the server itself has to show.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Protocol

from minserve.telemetry.declarations import HOSTNAME, KINDS, Declaration
from minserve.telemetry.lines import Logged
from minserve.telemetry.series import Nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Sequence

    from minserve.telemetry.declarations import Kind
    from minserve.telemetry.series import Family, Labels, Series

# A handler that puts a request's id into a label makes a series with each request. So many are borne.
MOST_SERIES = 10_000
MOST_LABELS = 50
LONGEST_LABEL = 500  # characters of a name, or of a label's value that a handler has set
METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL_NAME = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
OWN_PREFIX = "minserve_"
RESERVED_LABELS = frozenset({HOSTNAME, "Rank", "le"})  # added here

logger = logging.getLogger(__name__)


class Recorded(Protocol):
    """One value that a rank has sent, see `wire.messages.Metric`."""

    name: str
    value: float
    unit: str
    kind: str
    dimensions: tuple[tuple[str, str], ...]
    request_id: str
    at: float


class Complaints:
    """Warnings about metrics: what is wrong with one of them is told once, however often it comes."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def tell(self, name: str, what: str, about: str = "") -> None:
        """Warns.

        Args:
            name: of the metric that is dropped; "" if it is about all.
            about: which of several complaints about it this is.
        """
        if (name, about) not in self._told and len(self._told) < MOST_SERIES:
            self._told.add((name, about))
            logger.warning("%s", f"metric {name[:100]} {what}; it is dropped" if name else what)


class HandlerMetrics:
    """The metrics that handlers may record.

    Args:
        declared: those of metrics_config.
        make: gives a metric its place, in Prometheus or in the log.
        taken: names of the server's own.
        auto_detect: what nobody has declared is taken in, too.
        prometheus: what is taken in goes to Prometheus.
    """

    def __init__(
        self,
        declared: Iterable[Declaration],
        make: Callable[[Declaration], Family | Logged],
        taken: Container[str],
        auto_detect: bool,
        prometheus: bool,
        hostname: str,
        complaints: Complaints,
    ) -> None:
        self._make = make
        self._taken = taken
        self._auto_detect = auto_detect
        self._prometheus = prometheus
        self._hostname = hostname
        self._complaints = complaints
        self._metrics = {one.name: self._metric(one) for one in declared}
        self._declared = frozenset(self._metrics)
        self._series = 0

    def record(self, rank: int, values: Iterable[Recorded]) -> None:
        """Records what a rank has sent. What cannot be taken is told once, and dropped."""
        for value in values:
            metric = self._metrics.get(value.name) or self._detected(value)
            if metric is None:
                continue
            labels = self._labels(rank, value.name, value.dimensions, metric.declaration)
            if labels is None:
                continue
            if metric.declaration.kind == "counter" and not value.value >= 0:
                what = f"is declared a counter and cannot grow by {value.value:g}"
                self._complaints.tell(value.name, what, "value")
            elif isinstance(metric, Logged):
                metric.log(labels, value.value, value.request_id, value.at)
            elif self._has_room(metric, labels):
                metric.series(labels).record(value.value)

    def gauge(self, name: str, dimensions: Labels) -> Series:
        """The series of a gauge of rank 0 that somebody else records. One that is not declared as such is dropped."""
        metric = self._metrics.get(name) if name in self._declared else None
        if metric is None or metric.declaration.kind != "gauge":
            return Nothing()
        labels = self._labels(0, name, dimensions, metric.declaration)
        if labels is None or not (isinstance(metric, Logged) or self._has_room(metric, labels)):
            return Nothing()
        return metric.series(labels)

    def _labels(self, rank: int, metric: str, dimensions: Labels, declared: Declaration) -> Labels | None:
        """The declared labels with those of a value, as with TorchServe, and behind them whose it is."""
        names, given = declared.dimensions[:-1], _once_each(dimensions)
        if len(names) != len(given):
            found = [name for name, _ in given[:MOST_LABELS]]
            what = f"has the dimensions {found}, declared are {list(declared.dimensions)}"
            self._complaints.tell(metric, what, "dimensions")
            return None
        labels = tuple((name, text[:LONGEST_LABEL]) for name, (_, text) in zip(names, given, strict=True))
        if rank:
            labels = (*labels, ("Rank", str(rank)))
        return (*labels, (HOSTNAME, self._hostname))

    def _detected(self, value: Recorded) -> Family | Logged | None:
        names = tuple(name for name, _ in _once_each(value.dimensions))
        kind: Kind | None = next((kind for kind in KINDS if kind == value.kind), None)
        if not self._auto_detect:
            what = "is not declared in metrics_config, and model_metrics_auto_detect is off"
            self._complaints.tell(value.name, what)
        elif kind is None or value.name in self._taken or not self._fits(value.name, names):
            what = f"cannot be taken in as a {value.kind[:20]} with the dimensions {list(names[:MOST_LABELS])}"
            self._complaints.tell(value.name, what)
        elif len(self._metrics) >= MOST_SERIES:
            self._complaints.tell("", f"handlers have recorded {MOST_SERIES} metrics; others are dropped", "metrics")
        else:
            logger.info("metric %s of a handler is taken in: nobody has declared it", value.name)
            metric = self._metric(Declaration(value.name, kind, value.unit[:LONGEST_LABEL], names))
            self._metrics[value.name] = metric
            return metric
        return None

    def _fits(self, name: str, dimensions: Sequence[str]) -> bool:
        """Whether Prometheus takes them, where they go there: one metric of which it does not would cost it all others."""
        if len(dimensions) > MOST_LABELS or any(len(one) > LONGEST_LABEL for one in (name, *dimensions)):
            return False
        if not self._prometheus:
            return True
        if METRIC_NAME.fullmatch(name) is None or name.startswith(OWN_PREFIX):
            return False
        return all(LABEL_NAME.fullmatch(one) and one not in RESERVED_LABELS for one in dimensions)

    def _has_room(self, family: Family, labels: Labels) -> bool:
        if family.has(labels):
            return True
        if self._series >= MOST_SERIES:
            text = f"handlers have made {MOST_SERIES} series, a label of theirs has ever new values; others are dropped"
            self._complaints.tell("", text, "series")
            return False
        self._series += 1
        return True

    def _metric(self, declared: Declaration) -> Family | Logged:
        dimensions = (*declared.dimensions, HOSTNAME)
        return self._make(Declaration(declared.name, declared.kind, declared.unit, dimensions))


def _once_each(dimensions: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Of a label that is there twice the first, as with TorchServe: a handler's own goes before the usual one."""
    if len({name for name, _ in dimensions}) == len(dimensions):
        return dimensions
    first = dict(reversed(dimensions))
    return tuple((name, first[name]) for name in dict.fromkeys(name for name, _ in dimensions))
