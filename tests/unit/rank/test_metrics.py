from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest
import torch

from minserve.rank import metrics
from minserve.rank.metrics import CachingMetric, Dimension, MetricTypes
from minserve.wire.messages import Metric


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    metrics.take()
    yield
    metrics.take()


def test_a_value_is_recorded_with_the_labels_in_the_metrics_order() -> None:
    before = time.time()
    CachingMetric("Load", "ms", ["a", "b"], MetricTypes.GAUGE).add_or_update(1.5, ["x", 7], "r0,r1")
    (recorded,) = metrics.take()
    assert before <= recorded.at <= time.time()
    recorded.at = 0
    assert recorded == Metric("Load", 1.5, "Milliseconds", "gauge", (("a", "x"), ("b", "7")), "r0,r1", 0)
    assert metrics.take() == []


@pytest.mark.parametrize(
    ("unit", "full"),
    [("ms", "Milliseconds"), ("kB", "Kilobytes"), ("", "unit"), ("count", "Count"), ("images", "images")],
)
def test_a_unit_has_torchserves_full_name(unit: str, full: str) -> None:
    assert CachingMetric("m", unit).unit == full


@pytest.mark.parametrize(
    ("kind", "value", "labels", "reason"),
    [
        (MetricTypes.COUNTER, -1, ["x"], "a counter cannot grow by -1"),
        (MetricTypes.COUNTER, math.nan, ["x"], "a counter cannot grow by nan"),
        (MetricTypes.COUNTER, math.inf, ["x"], "a counter cannot grow by inf"),
        (MetricTypes.GAUGE, "1", ["x"], "'1' is not a number"),
        (MetricTypes.GAUGE, None, ["x"], "NoneType"),
        (MetricTypes.GAUGE, 10**400, ["x"], "int too large"),
        (MetricTypes.GAUGE, torch.ones(2), ["x"], "element"),
        (MetricTypes.GAUGE, 1, [], "its dimensions are ['a'], the values are []"),
        (MetricTypes.GAUGE, 1, ["x", "y"], "the values are ['x', 'y']"),
        (MetricTypes.GAUGE, 1, "x", "the values are 'x'"),
        (MetricTypes.GAUGE, 1, None, "the values are None"),
    ],
)
def test_a_wrong_value_is_told_and_left_out(
    kind: MetricTypes, value: float, labels: list[str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    CachingMetric("m", "", ["a"], kind).add_or_update(value, labels)
    assert metrics.take() == []
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("metric m is not updated: ")
    assert reason in record.getMessage()


def test_numbers_of_any_kind_are_numbers() -> None:
    gauge = CachingMetric("m", "", [], MetricTypes.GAUGE)
    for value in (-2, True, torch.tensor(0.5)):
        gauge.add_or_update(value)  # type: ignore[arg-type]  # a tensor is what authors have at hand
    assert [recorded.value for recorded in metrics.take()] == [-2.0, 1.0, 0.5]


def test_an_update_in_the_older_way_brings_its_labels() -> None:
    metric = CachingMetric("m", "", ["a"])
    metric.update(2, "r0", [Dimension("b", "x"), Dimension("c", "y")])
    metric.update(3)
    assert [recorded.dimensions for recorded in metrics.take()] == [(("b", "x"), ("c", "y")), ()]


def test_text_that_has_no_utf_8_is_spelled_out() -> None:
    CachingMetric("m", "", ["a"]).add_or_update(1, ["\udcff"], "r\ud800")
    (recorded,) = metrics.take()
    assert (recorded.dimensions, recorded.request_id) == ((("a", "\\udcff"),), "r\\ud800")


def test_what_nobody_takes_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = CachingMetric("m", "", [])
    for number in range(metrics.MOST_PENDING + 3):
        metric.add_or_update(number)
    taken = metrics.take()
    assert (len(taken), taken[0].value) == (metrics.MOST_PENDING, 3)


def test_a_dimension_has_torchserves_members() -> None:
    dimension = Dimension("Level", "Model")
    assert (dimension.name, dimension.value, str(dimension)) == ("Level", "Model", "Level:Model")
    assert dimension.to_dict() == {"Name": "Level", "Value": "Model"}
