from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minserve.rank import metrics
from minserve.rank.metric_cache import MetricsCache
from minserve.rank.metrics import (
    Dimension,
    MetricsCacheKeyError,
    MetricsCacheTypeError,
    MetricsCacheValueError,
    MetricTypes,
)

OWN = (("ModelName", "m"), ("Level", "Model"))
MINE = [Dimension("a", "x")]


@pytest.fixture
def cache() -> Iterator[MetricsCache]:
    metrics.take()
    cache = MetricsCache(model_name="m")
    cache.set_request_ids({0: "r0", 1: "r1"})
    yield cache
    metrics.take()


Seen = tuple[str, float, str, str, tuple[tuple[str, str], ...], str]


def taken() -> list[Seen]:
    return [(one.name, one.value, one.unit, one.kind, one.dimensions, one.request_id) for one in metrics.take()]


@pytest.mark.parametrize(
    ("add", "expected"),
    [
        (lambda c: c.add_counter("n", 2), ("n", 2, "Count", "counter", OWN, "r0,r1")),
        (lambda c: c.add_counter("n", 2, 1), ("n", 2, "Count", "counter", OWN, "r1")),
        (lambda c: c.add_counter("n", 2, 7), ("n", 2, "Count", "counter", OWN, "")),
        (lambda c: c.add_counter("n", 2, 0, MINE), ("n", 2, "Count", "counter", (("a", "x"), *OWN), "r0")),
        (lambda c: c.add_time("n", 2), ("n", 2, "Milliseconds", "gauge", OWN, "r0,r1")),
        (lambda c: c.add_time("n", 2, 0, "s"), ("n", 2, "Seconds", "gauge", OWN, "r0")),
        (
            lambda c: c.add_time("n", 2, metric_type=MetricTypes.HISTOGRAM),
            ("n", 2, "Milliseconds", "histogram", OWN, "r0,r1"),
        ),
        (lambda c: c.add_size("n", 2), ("n", 2, "Megabytes", "gauge", OWN, "r0,r1")),
        (lambda c: c.add_size("n", 2, unit="kB"), ("n", 2, "Kilobytes", "gauge", OWN, "r0,r1")),
        (lambda c: c.add_percent("n", 50, 1), ("n", 50, "Percent", "gauge", OWN, "r1")),
        (lambda c: c.add_error("n", 1), ("n", 1, "unit", "counter", (("Level", "Error"),), "")),
        (lambda c: c.add_error("n", 1, MINE), ("n", 1, "unit", "counter", (("a", "x"), ("Level", "Error")), "")),
        (lambda c: c.add_metric("n", 2, "words"), ("n", 2, "words", "counter", OWN, "r0,r1")),
    ],
)
def test_each_method_has_torchserves_defaults(
    cache: MetricsCache, add: Callable[[MetricsCache], None], expected: Seen
) -> None:
    add(cache)
    add(cache)  # the second time the metric is there; no label may have been added to it
    assert taken() == [expected, expected]


def test_while_loading_there_are_no_requests() -> None:
    MetricsCache(model_name="m").add_counter("n", 1)
    assert [seen[-1] for seen in taken()] == [""]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.add_time("n", 1, unit="h"), MetricsCacheValueError, "one of .'ms', 's'., not 'h'"),
        (lambda c: c.add_size("n", 1, unit="TB"), MetricsCacheValueError, "not 'TB'"),
        (lambda c: c.add_counter(5, 1), MetricsCacheTypeError, "metric_name must be a string, not 5"),
        (lambda c: c.add_time("n", 1, metric_type="gauge"), MetricsCacheTypeError, "metric_type must be one of"),
        (lambda c: c.add_metric_to_cache("n", 1), MetricsCacheTypeError, "unit must be a string"),
        (lambda c: c.add_metric_to_cache("n", "", "ab"), MetricsCacheTypeError, "dimension_names must be a list"),
        (lambda c: c.add_metric_to_cache("n", "", [1]), MetricsCacheTypeError, "dimension_names must be a list"),
        (lambda c: c.get_metric("n"), MetricsCacheKeyError, "there is no counter metric 'n'"),
        (lambda c: c.get_metric("n", "counter"), MetricsCacheTypeError, "metric_type must be one of"),
    ],
)
def test_wrong_arguments_are_errors(
    cache: MetricsCache, call: Callable[[MetricsCache], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(cache)
    assert taken() == []


def test_what_is_declared_can_be_had_and_nothing_else(cache: MetricsCache) -> None:
    declared = {"name": "PredictionTime", "type": "gauge", "unit": "ms", "dimensions": ["ModelName", "Level"]}
    cache.declare(json.dumps([declared]))
    cache.get_metric("PredictionTime", MetricTypes.GAUGE).add_or_update(3, ["m", "Model"], "r0")
    assert taken() == [("PredictionTime", 3, "Milliseconds", "gauge", OWN, "r0")]
    with pytest.raises(MetricsCacheKeyError):
        cache.get_metric("PredictionTime")  # a counter of that name
    assert cache.cache_keys() == ["gauge:PredictionTime"]
    cache.declare("")
    assert cache.cache_keys() == ["gauge:PredictionTime"]


def test_a_metric_that_was_added_can_be_had(cache: MetricsCache) -> None:
    added = cache.add_metric_to_cache("n", "s", ["a"], MetricTypes.HISTOGRAM)
    assert cache.get_metric("n", MetricTypes.HISTOGRAM) is added
    cache.add_counter("c", 1)
    assert cache.get_metric("c").dimension_names == ["ModelName", "Level"]


def test_a_yaml_in_torchserves_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.yaml"
    path.write_text(
        """
        dimensions:
          - &name "ModelName"
        ts_metrics:
          counter: [{name: Requests2XX, unit: Count, dimensions: [Level]}]
        model_metrics:
          gauge: [{name: HandlerTime, unit: ms, dimensions: [*name]}]
          histogram:
        """
    )
    cache = MetricsCache(config_file_path=str(path))
    cache.initialize_cache()
    assert cache.cache_keys() == ["gauge:HandlerTime"]
    assert cache.get_metric("HandlerTime", MetricTypes.GAUGE).dimension_names == ["ModelName"]


def test_a_copy_has_requests_of_its_own_and_the_same_metrics(cache: MetricsCache) -> None:
    other = copy.deepcopy(cache)
    other.set_request_ids({0: "s0"})
    other.add_counter("n", 1)
    cache.add_counter("n", 2)
    assert [(seen[1], seen[-1]) for seen in taken()] == [(1, "s0"), (2, "r0,r1")]
    assert other.get_metric("n") is cache.get_metric("n")
