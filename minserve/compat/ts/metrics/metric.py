"""A metric with one value, as handlers and scripts for older versions of TorchServe make them."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from minserve.rank.metrics import CachingMetric, MetricTypes, full_unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minserve.rank.metrics import Dimension


class Metric:
    """A value with its name, unit and labels.

    Args:
        request_id: of the requests that it belongs to, joined by ",".
        metric_method: "counter" for a value that is added up, anything else for one that is replaced.
    """

    def __init__(
        self,
        name: str,
        value: float,
        unit: str | None,
        dimensions: Sequence[Dimension],
        request_id: str | None = None,
        metric_method: str | None = None,
    ) -> None:
        self.name = name
        self.value = value
        self.unit = full_unit(unit)
        self.dimensions = list(dimensions)
        self.request_id = request_id
        self.metric_method = metric_method

    def update(self, value: float) -> None:
        """Adds to a counter, and sets any other."""
        self.value = self.value + value if self.metric_method == "counter" else value

    def reset(self) -> None:
        """Sets it to 0."""
        self.value = 0

    def emit(self) -> None:
        """Records the value, so that it leaves with the batch."""
        kind = MetricTypes.COUNTER if self.metric_method == "counter" else MetricTypes.GAUGE
        metric = CachingMetric(self.name, self.unit, [dimension.name for dimension in self.dimensions], kind)
        metric.add_or_update(self.value, [dimension.value for dimension in self.dimensions], self.request_id or "")

    def __str__(self) -> str:
        labels = ",".join(map(str, self.dimensions))
        request = f",{self.request_id}" if self.request_id else ""
        return f"{self.name}.{self.unit}:{self.value}|#{labels}|#hostname:{socket.gethostname()},{int(time.time())}{request}"

    def to_dict(self) -> dict[str, object]:
        """The metric as TorchServe's JSON has it; the labels as they are, for `MetricEncoder`."""
        return {
            "MetricName": self.name,
            "Value": self.value,
            "Unit": self.unit,
            "Dimensions": self.dimensions,
            "Timestamp": int(time.time()),
            "HostName": socket.gethostname(),
            "RequestId": self.request_id,
        }
