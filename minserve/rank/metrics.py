"""What a handler records as metrics, kept until the loop sends it with the batch (TorchServe's nouns: torchserve.md 3.4).

A wrong value never fails a batch: it is told in the log and left out.
"""

from __future__ import annotations

import enum
import logging
import math
import time
from collections import deque
from typing import TYPE_CHECKING

from minserve.wire.messages import Metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# TorchServe's loggers, formats and queries know the units by these names.
UNITS: dict[str | None, str] = {
    "ms": "Milliseconds",
    "s": "Seconds",
    "percent": "Percent",
    "count": "Count",
    "MB": "Megabytes",
    "GB": "Gigabytes",
    "kB": "Kilobytes",
    "B": "Bytes",
    "": "unit",
    None: "unit",
}
# What is recorded between two batches waits for the next one. A handler that records in a thread of its own while nobody
# asks for anything must not fill the memory with it: the oldest values go.
MOST_PENDING = 100_000

logger = logging.getLogger(__name__)
_pending: deque[Metric] = deque(maxlen=MOST_PENDING)  # a process is one rank; the recording function is given no handle


class MetricTypes(enum.Enum):
    """What becomes of a metric's values: added up, replaced, or counted by size."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Dimension:
    """A label of a metric and its value."""

    def __init__(self, name: str, value: object) -> None:
        self.name = name
        self.value = value

    def __str__(self) -> str:
        return f"{self.name}:{self.value}"

    def to_dict(self) -> dict[str, object]:
        """The label as TorchServe's JSON has it."""
        return {"Name": self.name, "Value": self.value}


class MetricsCacheTypeError(TypeError):
    """An argument is of a wrong type."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class MetricsCacheValueError(ValueError):
    """An argument is none of those allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class MetricsCacheKeyError(KeyError):
    """There is no such metric."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class CachingMetric:
    """One metric: its name, unit, labels and kind. Each value that it is given is sent with the batch.

    Args:
        unit: one of `UNITS`, or any other text.
        dimension_names: the labels' names; values come in their order.
    """

    def __init__(
        self,
        metric_name: str,
        unit: str,
        dimension_names: Sequence[str] | None = None,
        metric_type: MetricTypes = MetricTypes.COUNTER,
    ) -> None:
        self.metric_name = metric_name
        self.unit = full_unit(unit)
        self.dimension_names = list(dimension_names or ())
        self.metric_type = metric_type

    def add_or_update(self, value: float, dimension_values: Sequence[object] = (), request_id: str = "") -> None:
        """Records a value: what a counter grows by, what a gauge is set to, what a histogram observes.

        Args:
            dimension_values: one for each of the metric's dimension names, in their order.
            request_id: of the requests that it belongs to, joined by ",".
        """
        try:
            labels = self._labels(dimension_values)
            number = self._number(value)
        # The last two come of huge integers and of tensors.
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            logger.error("metric %s is not updated: %s", self.metric_name, error)
            return
        name, unit = _sendable(self.metric_name), _sendable(self.unit)
        _pending.append(Metric(name, number, unit, self.metric_type.value, labels, _sendable(request_id), time.time()))

    def update(self, value: float, request_id: str = "", dimensions: Iterable[Dimension] = ()) -> None:
        """Records a value the way handlers for older versions of TorchServe do: with these labels in place of its own."""
        dimensions = list(dimensions)
        self.dimension_names = [dimension.name for dimension in dimensions]
        self.add_or_update(value, [dimension.value for dimension in dimensions], request_id)

    def _labels(self, values: Sequence[object]) -> tuple[tuple[str, str], ...]:
        if values is None or isinstance(values, str) or len(values) != len(self.dimension_names):
            raise ValueError(f"its dimensions are {self.dimension_names}, the values are {values!r}")
        return tuple(
            (_sendable(str(name)), _sendable(str(value)))
            for name, value in zip(self.dimension_names, values, strict=True)
        )

    def _number(self, value: object) -> float:
        if isinstance(value, str):
            raise TypeError(f"{value!r} is not a number")
        number = float(value)  # type: ignore[arg-type]  # a number of any kind, also a tensor's or numpy's
        if self.metric_type is MetricTypes.COUNTER and not 0 <= number < math.inf:
            raise ValueError(f"a counter cannot grow by {number:g}")
        return number


def full_unit(unit: str | None) -> str:
    """The unit's name in full, where TorchServe has one."""
    return UNITS.get(unit, str(unit))


def take() -> list[Metric]:
    """What has been recorded since the last call."""
    if not _pending:
        return []
    # Value by value: threads of the handler may be recording.
    return [_pending.popleft() for _ in range(len(_pending))]


def _sendable(text: str) -> str:
    """Lone surrogates, which come with clients' headers, have no UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
