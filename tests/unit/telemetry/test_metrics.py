import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from minserve.telemetry.declarations import DEFAULT, INFERENCES, LOAD_TIME, Declaration, Declarations
from minserve.telemetry.metrics import Metrics, Mode
from minserve.wire.messages import Metric

OWN = (("ModelName", "m"), ("Level", "Model"))


def make(mode: Mode = "prometheus") -> Metrics:
    return Metrics(DEFAULT, mode, hostname="here", now=lambda: 1700.9)


def value(dimensions: tuple[tuple[str, str], ...] = OWN, ids: str = "a,b") -> Metric:
    return Metric("PredictionTime", 1.5, "Milliseconds", "gauge", dimensions, ids, 1800.2)


def samples(metrics: Metrics) -> list[str]:
    return [line for line in metrics.text().splitlines() if not line.startswith("#")]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    for name in ("ts_metrics", "model_metrics"):
        caplog.set_level(logging.INFO, name)
    return caplog


def logged(lines: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.name, record.getMessage()) for record in lines.records]


# ── where a value goes ──


def test_in_mode_prometheus_every_metric_is_shown_and_nothing_is_logged(lines: pytest.LogCaptureFixture) -> None:
    metrics = make()
    metrics.of_server(INFERENCES, "m", "default").record(1)
    metrics.from_rank(0, [value()])
    assert samples(metrics) == [
        'ts_inference_requests_total{model_name="m",model_version="default",hostname="here",} 1.0',
        'PredictionTime{ModelName="m",Level="Model",Hostname="here",} 1.5',
    ]
    families = {family.name for family in text_string_to_metric_families(metrics.text())}
    declared = {one.name.removesuffix("_total") for one in (*DEFAULT.server, *DEFAULT.model)}
    assert families == declared
    assert logged(lines) == []


def test_in_mode_log_every_value_is_a_line_and_nothing_is_shown(lines: pytest.LogCaptureFixture) -> None:
    metrics = make("log")
    metrics.of_server(LOAD_TIME, "W-9000-m_1.0", "Host").record(1309)
    metrics.of_server(INFERENCES, "m", "default").record(1)
    metrics.from_rank(0, [value(), value(ids="")])
    assert metrics.text() == ""
    assert logged(lines) == [
        (
            "ts_metrics",
            "WorkerLoadTime.Milliseconds:1309.0|#WorkerName:W-9000-m_1.0,Level:Host|#hostname:here,timestamp:1700",
        ),
        (
            "ts_metrics",
            "ts_inference_requests_total.Count:1.0|#model_name:m,model_version:default|#hostname:here,timestamp:1700",
        ),
        (
            "model_metrics",
            "PredictionTime.ms:1.5|#ModelName:m,Level:Model|#hostname:here,requestID:a,b,timestamp:1800",
        ),
        ("model_metrics", "PredictionTime.ms:1.5|#ModelName:m,Level:Model|#hostname:here,timestamp:1800"),
    ]


def test_in_mode_legacy_three_counters_are_shown_and_the_rest_is_logged(lines: pytest.LogCaptureFixture) -> None:
    metrics = make("legacy")
    metrics.of_server(INFERENCES, "m", "1.0").record(1)
    metrics.answered(200)
    heads = [line.split()[2] for line in metrics.text().splitlines() if line.startswith("# TYPE")]
    assert heads == [
        "ts_inference_requests_total",
        "ts_inference_latency_microseconds",
        "ts_queue_latency_microseconds",
    ]
    assert [text for _, text in logged(lines)] == ["Requests2XX.Count:1.0|#Level:Host|#hostname:here,timestamp:1700"]


def test_a_label_cannot_fake_another_line(lines: pytest.LogCaptureFixture) -> None:
    make("log").from_rank(0, [value(dimensions=(("ModelName", "m\nX.Count:1|#"), ("Level", "Model")))])
    ((_, line),) = logged(lines)
    assert "\n" not in line


# ── answers ──


def test_answers_are_counted_by_their_first_digit_and_what_is_neither_2_nor_4_is_5() -> None:
    metrics = make()
    for status in (200, 206, 404, 503, 304, 100):
        metrics.answered(status)
    assert samples(metrics) == [
        f'Requests{digit}XX{{Level="Host",Hostname="here",}} {count}' for digit, count in ((2, 2.0), (4, 1.0), (5, 3.0))
    ]


def test_the_text_of_load_metrics_is_what_ranks_read() -> None:
    declared = Declarations((), (Declaration("HandlerTime", "gauge", "ms", ("ModelName", "Level")),))
    assert declared.for_ranks() == (
        '[{"name": "HandlerTime", "type": "gauge", "unit": "ms", "dimensions": ["ModelName", "Level"]}]'
    )


# ── the machine ──


def test_a_value_of_the_machine_that_is_not_declared_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    metrics = make()
    metrics.system("CPUUtilization", 12.5, ["Host"])
    metrics.system("FanSpeed", 1, ["Host"])
    metrics.system("MemoryUsed", 1, ["Host", "more"])
    assert samples(metrics) == ['CPUUtilization{Level="Host",Hostname="here",} 12.5']
    assert "MemoryUsed has 3 dimensions" in caplog.text
