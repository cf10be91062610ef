"""The metrics of a batch, as handlers for older versions of TorchServe collect them before `ts.service.emit_metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.rank.metric_cache import SIZE_UNITS, TIME_UNITS
from minserve.rank.metrics import Dimension

from .metric import Metric

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class MetricsStore:
    """Collects metrics in `store`. Values of the same metric, labels and request are added up (counters) or replaced.

    Args:
        request_ids: {index in the batch: request id}.
    """

    def __init__(self, request_ids: Mapping[int, str], model_name: str) -> None:
        self.request_ids = request_ids
        self.model_name = model_name
        self.store: list[Metric] = []
        self.cache: dict[str, Metric] = {}

    def add_counter(
        self, name: str, value: float, idx: int | None = None, dimensions: Sequence[Dimension] | None = None
    ) -> None:
        """Lets a counter grow by `value`."""
        self._add(name, value, "count", self._request(idx), self._labels(dimensions), "counter")

    def add_time(
        self,
        name: str,
        value: float,
        idx: int | None = None,
        unit: str = "ms",
        dimensions: Sequence[Dimension] | None = None,
    ) -> None:
        """Sets a time.

        Raises:
            ValueError: the unit is neither "ms" nor "s".
        """
        if unit not in TIME_UNITS:
            raise ValueError(f"the unit of a time is one of {list(TIME_UNITS)}, not {unit!r}")
        self.add_metric(name, value, unit, idx, dimensions)

    def add_size(
        self,
        name: str,
        value: float,
        idx: int | None = None,
        unit: str = "MB",
        dimensions: Sequence[Dimension] | None = None,
    ) -> None:
        """Sets a size.

        Raises:
            ValueError: the unit is none of "MB", "kB", "GB", "B".
        """
        if unit not in SIZE_UNITS:
            raise ValueError(f"the unit of a size is one of {list(SIZE_UNITS)}, not {unit!r}")
        self.add_metric(name, value, unit, idx, dimensions)

    def add_percent(
        self, name: str, value: float, idx: int | None = None, dimensions: Sequence[Dimension] | None = None
    ) -> None:
        """Sets a share in percent."""
        self.add_metric(name, value, "percent", idx, dimensions)

    def add_error(self, name: str, value: float, dimensions: Sequence[Dimension] | None = None) -> None:
        """Sets an error's value; it belongs to no request."""
        self._add(name, value, "", None, [*(dimensions or ()), Dimension("Level", "Error")], None)

    def add_metric(
        self,
        name: str,
        value: float,
        unit: str,
        idx: int | None = None,
        dimensions: Sequence[Dimension] | None = None,
    ) -> None:
        """Sets any other value."""
        self._add(name, value, unit, self._request(idx), self._labels(dimensions), None)

    def _labels(self, dimensions: Sequence[Dimension] | None) -> list[Dimension]:
        return [*(dimensions or ()), Dimension("ModelName", self.model_name), Dimension("Level", "Model")]

    def _request(self, idx: int | None) -> str | None:
        return ",".join(self.request_ids.values()) if idx is None else self.request_ids.get(idx)

    def _add(
        self,
        name: str,
        value: float,
        unit: str,
        request_id: str | None,
        dimensions: list[Dimension],
        method: str | None,
    ) -> None:
        key = "-".join([name, unit, str(request_id), *map(str, dimensions)])
        if key in self.cache:
            self.cache[key].update(value)
        else:
            self.cache[key] = Metric(name, value, unit, dimensions, request_id, method)
            self.store.append(self.cache[key])
