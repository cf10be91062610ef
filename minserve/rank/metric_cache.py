"""`context.metrics`: the metrics that are declared, and the methods by which handlers add their own (torchserve.md 3.4)."""

from __future__ import annotations

import copy
import json
import logging
from typing import TYPE_CHECKING, TypedDict

import yaml

from minserve.rank.metrics import (
    CachingMetric,
    Dimension,
    MetricsCacheKeyError,
    MetricsCacheTypeError,
    MetricsCacheValueError,
    MetricTypes,
)
from minserve.rank.requests import Requests

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TIME_UNITS = ("ms", "s")
SIZE_UNITS = ("MB", "kB", "GB", "B")

logger = logging.getLogger(__name__)


class Declaration(TypedDict):
    """A metric of `metrics_config`, as the server passes it on."""

    name: str
    type: str
    unit: str
    dimensions: list[str]


class MetricsCache:
    """The metrics of one model on this rank.

    Every `add_*` method takes a value and gives it the labels `dimensions` and behind them ModelName and Level. `idx` is the
    place of the request in the batch that the value belongs to; None: it belongs to all of them.

    Args:
        config_file_path: a metrics YAML in TorchServe's format, for `initialize_cache`. In a rank there is none: what is
            declared comes with LOAD.

    Attributes:
        cache: the metrics by kind and name.
        store: TorchServe's list for older handlers; always empty.
    """

    def __init__(self, config_file_path: str = "", model_name: str = "") -> None:
        self.config_file_path = config_file_path
        self.model_name = model_name
        self.cache: dict[MetricTypes, dict[str, CachingMetric]] = {}
        self.store: list[object] = []
        self._requests = Requests()

    def declare(self, declarations: str) -> None:
        """Adds the metrics of a LOAD message: JSON text, "" for none."""
        known: list[Declaration] = json.loads(declarations or "[]")
        for one in known:
            self.add_metric_to_cache(one["name"], one["unit"], one["dimensions"], MetricTypes(one["type"]))

    def initialize_cache(self) -> None:
        """Adds the `model_metrics` of the metrics YAML."""
        with open(self.config_file_path, encoding="utf-8") as file:
            sections = yaml.safe_load(file) or {}
        for kind, metrics in (sections.get("model_metrics") or {}).items():
            for one in metrics or ():
                self.add_metric_to_cache(one["name"], one["unit"], one["dimensions"], MetricTypes(kind))

    def begin_batch(self, requests: Requests) -> None:
        """A new batch."""
        self._requests = requests

    @property
    def request_ids(self) -> dict[int, str] | None:
        """Of the batch, by place in it; None while the handler loads."""
        return self._requests.ids

    @request_ids.setter
    def request_ids(self, ids: dict[int, str]) -> None:
        self._requests = Requests()
        self._requests.ids = ids

    def set_request_ids(self, request_ids: dict[int, str]) -> None:
        """A new batch, as TorchServe tells it."""
        self.request_ids = request_ids

    def for_requests(self, requests: Requests) -> MetricsCache:
        """The same metrics, for a batch that is worked on beside others."""
        other = MetricsCache(self.config_file_path, self.model_name)
        other.cache = self.cache
        other.begin_batch(requests)
        return other

    def __deepcopy__(self, memo: object) -> MetricsCache:
        return self.for_requests(copy.deepcopy(self._requests))

    # ── metrics by name ──

    def add_metric_to_cache(
        self,
        metric_name: str,
        unit: str,
        dimension_names: Sequence[str] = (),
        metric_type: MetricTypes = MetricTypes.COUNTER,
    ) -> CachingMetric:
        """Declares a metric, in place of one of this name and kind.

        Raises:
            MetricsCacheTypeError: an argument is of a wrong type.
        """
        _check_key(metric_name, metric_type)
        if not isinstance(unit, str):
            raise MetricsCacheTypeError(f"unit must be a string, not {unit!r}")
        if isinstance(dimension_names, str) or not all(isinstance(name, str) for name in dimension_names):
            raise MetricsCacheTypeError(f"dimension_names must be a list of strings, not {dimension_names!r}")
        of_kind = self.cache.setdefault(metric_type, {})
        if metric_name in of_kind:
            logger.warning("metric %s of type %s is declared anew", metric_name, metric_type.value)
        of_kind[metric_name] = CachingMetric(metric_name, unit, dimension_names, metric_type)
        return of_kind[metric_name]

    def get_metric(self, metric_name: str, metric_type: MetricTypes = MetricTypes.COUNTER) -> CachingMetric:
        """A metric that metrics_config declares or that was added.

        Raises:
            MetricsCacheKeyError: there is none of this name and kind.
            MetricsCacheTypeError: an argument is of a wrong type.
        """
        _check_key(metric_name, metric_type)
        metric = self.cache.get(metric_type, {}).get(metric_name)
        if metric is None:
            raise MetricsCacheKeyError(f"there is no {metric_type.value} metric {metric_name!r}")
        return metric

    def cache_keys(self) -> list[str]:
        """The metrics as kind:name."""
        return [f"{kind.value}:{name}" for kind, metrics in self.cache.items() for name in metrics]

    # ── values ──

    def add_metric(
        self,
        name: str,
        value: float,
        unit: str,
        idx: int | None = None,
        dimensions: Iterable[Dimension] = (),
        metric_type: MetricTypes = MetricTypes.COUNTER,
    ) -> None:
        """Records a value of any metric; one that is not there yet is added with these labels."""
        own = [Dimension("ModelName", self.model_name), Dimension("Level", "Model")]
        self._record(name, value, unit, [*dimensions, *own], self._request(idx), metric_type)

    def add_counter(
        self, name: str, value: float, idx: int | None = None, dimensions: Iterable[Dimension] = ()
    ) -> None:
        """Lets a counter grow by `value`."""
        self.add_metric(name, value, "count", idx, dimensions, MetricTypes.COUNTER)

    def add_time(
        self,
        name: str,
        value: float,
        idx: int | None = None,
        unit: str = "ms",
        dimensions: Iterable[Dimension] = (),
        metric_type: MetricTypes = MetricTypes.GAUGE,
    ) -> None:
        """Records a time.

        Raises:
            MetricsCacheValueError: the unit is neither "ms" nor "s".
        """
        if unit not in TIME_UNITS:
            raise MetricsCacheValueError(f"the unit of a time is one of {list(TIME_UNITS)}, not {unit!r}")
        self.add_metric(name, value, unit, idx, dimensions, metric_type)

    def add_size(
        self,
        name: str,
        value: float,
        idx: int | None = None,
        unit: str = "MB",
        dimensions: Iterable[Dimension] = (),
        metric_type: MetricTypes = MetricTypes.GAUGE,
    ) -> None:
        """Records a size.

        Raises:
            MetricsCacheValueError: the unit is none of "MB", "kB", "GB", "B".
        """
        if unit not in SIZE_UNITS:
            raise MetricsCacheValueError(f"the unit of a size is one of {list(SIZE_UNITS)}, not {unit!r}")
        self.add_metric(name, value, unit, idx, dimensions, metric_type)

    def add_percent(
        self,
        name: str,
        value: float,
        idx: int | None = None,
        dimensions: Iterable[Dimension] = (),
        metric_type: MetricTypes = MetricTypes.GAUGE,
    ) -> None:
        """Records a share in percent."""
        self.add_metric(name, value, "percent", idx, dimensions, metric_type)

    def add_error(self, name: str, value: float, dimensions: Iterable[Dimension] = ()) -> None:
        """Counts errors. They belong to no request, and have the label Level:Error in place of the usual two."""
        self._record(name, value, "", [*dimensions, Dimension("Level", "Error")], "", MetricTypes.COUNTER)

    def _record(
        self,
        name: str,
        value: float,
        unit: str,
        dimensions: list[Dimension],
        request_id: str,
        metric_type: MetricTypes,
    ) -> None:
        _check_key(name, metric_type)
        metric = self.cache.get(metric_type, {}).get(name)
        if metric is None:
            metric = self.add_metric_to_cache(name, unit, [dimension.name for dimension in dimensions], metric_type)
        metric.add_or_update(value, [dimension.value for dimension in dimensions], request_id)

    def _request(self, idx: int | None) -> str:
        ids = self.request_ids or {}
        return ",".join(ids.values()) if idx is None else ids.get(idx, "")


def _check_key(name: str, metric_type: MetricTypes) -> None:
    if not isinstance(name, str):
        raise MetricsCacheTypeError(f"metric_name must be a string, not {name!r}")
    if not isinstance(metric_type, MetricTypes):
        raise MetricsCacheTypeError(f"metric_type must be one of MetricTypes, not {metric_type!r}")
