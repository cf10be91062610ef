"""`ts.metrics`, `ts.service` and `ts.protocol`, imported as handlers do."""

from __future__ import annotations

import importlib
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest

import minserve
from minserve.rank import metrics
from minserve.rank.context import Context
from minserve.rank.metric_cache import MetricsCache

COMPAT = Path(minserve.__file__).parent / "compat"
NAMES = [path.stem for path in (COMPAT / "ts" / "metrics").glob("*.py") if path.stem != "__init__"]


@pytest.fixture(autouse=True)
def _ts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(COMPAT)
    metrics.take()
    yield
    metrics.take()


def ts(name: str) -> ModuleType:
    return importlib.import_module(f"ts.{name}")


def test_handlers_find_our_classes_under_torchserves_names() -> None:
    assert ts("metrics.dimension").Dimension is metrics.Dimension
    assert ts("metrics.metric_type_enum").MetricTypes is metrics.MetricTypes
    assert ts("metrics.caching_metric").CachingMetric is metrics.CachingMetric
    assert ts("metrics.metric_abstract").MetricAbstract is metrics.CachingMetric
    assert ts("metrics.metric_cache_yaml_impl").MetricsCacheYamlImpl is MetricsCache
    assert ts("metrics.metric_cache_abstract").MetricCacheAbstract is MetricsCache
    errors = ts("metrics.metric_cache_errors")
    assert issubclass(errors.MetricsCacheKeyError, KeyError)
    assert issubclass(errors.MetricsCacheTypeError, TypeError)
    assert issubclass(errors.MetricsCacheValueError, ValueError)
    assert ts("metrics.unit").Units().units["ms"] == "Milliseconds"
    with pytest.raises(errors.MetricsCacheKeyError) as caught:
        MetricsCache().get_metric("n")
    assert caught.value.message == "there is no counter metric 'n'"


def test_a_store_adds_up_counters_and_replaces_the_rest() -> None:
    store = ts("metrics.metrics_store").MetricsStore({0: "r0", 1: "r1"}, "m")
    mine = [metrics.Dimension("a", "x")]
    store.add_counter("c", 1)
    store.add_counter("c", 2)
    store.add_counter("c", 5, 0)
    store.add_counter("c", 7, 0, mine)
    store.add_time("t", 1)
    store.add_time("t", 9)
    store.add_size("s", 1, unit="GB")
    store.add_percent("p", 1, 1)
    store.add_error("e", 1)
    store.add_metric("x", 1, "words")
    assert metrics.take() == []
    ts("service").emit_metrics(store.store)
    own = (("ModelName", "m"), ("Level", "Model"))
    assert [(m.name, m.value, m.unit, m.kind, m.dimensions, m.request_id) for m in metrics.take()] == [
        ("c", 3, "Count", "counter", own, "r0,r1"),
        ("c", 5, "Count", "counter", own, "r0"),
        ("c", 7, "Count", "counter", (("a", "x"), *own), "r0"),
        ("t", 9, "Milliseconds", "gauge", own, "r0,r1"),
        ("s", 1, "Gigabytes", "gauge", own, "r0,r1"),
        ("p", 1, "Percent", "gauge", own, "r1"),
        ("e", 1, "unit", "gauge", (("Level", "Error"),), ""),
        ("x", 1, "words", "gauge", own, "r0,r1"),
    ]
    assert len(mine) == 1


@pytest.mark.parametrize(("method", "unit"), [("add_time", "h"), ("add_size", "TB")])
def test_a_store_refuses_units_that_are_none(method: str, unit: str) -> None:
    with pytest.raises(ValueError, match=f"not '{unit}'"):
        getattr(ts("metrics.metrics_store").MetricsStore({}, "m"), method)("n", 1, unit=unit)


def test_a_metric_is_written_as_torchserves_logs_have_it() -> None:
    make = ts("metrics.metric").Metric
    labels = [metrics.Dimension("a", "x"), metrics.Dimension("b", 2)]
    assert re.fullmatch(r"n\.Milliseconds:1\|#a:x,b:2\|#hostname:[^,]+,\d+,r0", str(make("n", 1, "ms", labels, "r0")))
    assert re.fullmatch(r"n\.words:1\|#\|#hostname:[^,]+,\d+", str(make("n", 1, "words", [])))
    encoded = json.loads(json.dumps(make("n", 1, "ms", labels), cls=ts("metrics.metric_encoder").MetricEncoder))
    assert list(encoded) == ["MetricName", "Value", "Unit", "Dimensions", "Timestamp", "HostName", "RequestId"]
    assert encoded["Dimensions"] == [{"Name": "a", "Value": "x"}, {"Name": "b", "Value": 2}]
    counter = make("n", 1, "", [], metric_method="counter")
    counter.update(2)
    assert counter.value == 3
    counter.reset()
    assert counter.value == 0


def test_the_machines_metrics_are_logged_a_line_each(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    system = ts("metrics.system_metrics")
    monkeypatch.setattr(system, "system_metrics", [])
    with caplog.at_level(logging.INFO):
        system.collect_all(system, 0)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(".")[0] for line in lines] == [
        *("CPUUtilization", "DiskAvailable", "DiskUsage", "DiskUtilization"),
        *("MemoryAvailable", "MemoryUsed", "MemoryUtilization", ""),
    ]
    assert all("|#Level:Host|#hostname:" in line for line in lines[:-1])


def test_the_memory_of_processes_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    me = psutil.Process().pid
    with caplog.at_level(logging.INFO):
        ts("metrics.process_memory_metric").check_process_mem_usage(io.StringIO(f"{me}, 999999999"))
    first, _, last = [record.getMessage() for record in caplog.records]
    assert int(first.removeprefix(f"{me}:")) > 1_000_000
    assert last == "999999999:0"


def test_a_service_has_a_context() -> None:
    service = ts("service").Service("m", "/m", {"model": {}}, print, None, 4)
    assert isinstance(service.context, Context)
    assert service.context.system_properties["batch_size"] == 4
    assert ts("service").PredictionException is ts("utils.util").PredictionException


def test_the_streaming_function_has_its_older_home() -> None:
    sending = ts("handler_utils.utils").send_intermediate_predict_response
    assert ts("protocol.otf_message_handler").send_intermediate_predict_response is sending


@pytest.mark.parametrize("name", NAMES)
def test_every_module_can_be_imported(name: str) -> None:
    assert ts(f"metrics.{name}").__doc__
