import logging

import pytest

from minserve.telemetry.declarations import Declaration, Declarations
from minserve.telemetry.meters import ModelMeters
from minserve.telemetry.metrics import Metrics
from minserve.telemetry.series import Histogram


def make() -> tuple[ModelMeters, Metrics]:
    metrics = Metrics(hostname="here")
    return ModelMeters(metrics, "m", "2.0"), metrics


def samples(metrics: Metrics) -> dict[str, str]:
    """Value by name and version; WorkerLoadTime by its whole labels."""
    lines = (line for line in metrics.text().splitlines() if not line.startswith("#"))
    return {name.replace(',hostname="here",', ""): value for name, value in (line.rsplit(" ", 1) for line in lines)}


def seen(histogram: Histogram) -> tuple[int, float]:
    return histogram.buckets()[-1][1], round(histogram.total, 9)


def test_a_request_that_names_no_version_counts_as_default() -> None:
    meters, metrics = make()
    meters.arrived(named=False)
    meters.arrived(named=False)
    meters.arrived(named=True)
    assert samples(metrics) == {
        'ts_inference_requests_total{model_name="m",model_version="default"}': "2.0",
        'ts_inference_requests_total{model_name="m",model_version="2.0"}': "1.0",
    }


def test_an_answer_adds_its_latencies_in_microseconds_and_sets_the_queue_time_in_milliseconds() -> None:
    meters, metrics = make()
    for waited in (0.5, 0.25):
        meters.answered(False, arrived=10.0, sent=10.0 + waited, now=11.0)
    assert samples(metrics) == {
        'ts_inference_latency_microseconds{model_name="m",model_version="default"}': "2000000.0",
        'ts_queue_latency_microseconds{model_name="m",model_version="default"}': "750000.0",
        'QueueTime{Level="Host",Hostname="here",}': "250.0",
    }


def test_the_wait_is_for_company_up_to_when_the_batch_was_due_and_then_for_a_place() -> None:
    meters, _ = make()
    meters.left_queue([10.0, 11.0], due=10.5, sent=12.0)  # the second came when the batch was overdue
    assert seen(meters.batch_wait) == (2, 0.5)
    assert seen(meters.queue) == (2, 2.5)


def test_where_none_waits_for_company_that_stage_has_no_values() -> None:
    meters, _ = make()
    meters.left_queue([10.0], due=0.0, sent=12.0)
    assert seen(meters.batch_wait) == (0, 0.0)
    assert seen(meters.queue) == (1, 2.0)


def test_a_batch_counts_for_each_of_its_requests() -> None:
    meters, metrics = make()
    meters.batch_sent(4, began=1.0, written=1.25)
    meters.batch_answered(4, written=1.25, replied=2.25, overhead=0.002)
    assert seen(meters.broadcast) == (4, 1.0)
    assert seen(meters.rank0) == (4, 4.0)
    assert samples(metrics) == {'WorkerThreadTime{Level="Host",Hostname="here",}': "2.0"}


def test_the_time_in_handle_is_shown_in_milliseconds_and_logged_with_the_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    meters, metrics = make()
    meters.handled(0.0123456, ["a", "b"])
    assert samples(metrics) == {'PredictionTime{ModelName="m",Level="Model",Hostname="here",}': "12.35"}
    caplog.set_level(logging.INFO, "model_metrics")
    logged = Metrics(mode="log", hostname="here", now=lambda: 1700.9)
    ModelMeters(logged, "m", "2.0").handled(0.0123456, ["a", "b"])
    line = "PredictionTime.ms:12.35|#ModelName:m,Level:Model|#hostname:here,requestID:a,b,timestamp:1700"
    assert caplog.messages == [line]


@pytest.mark.parametrize(
    ("declared", "complaints"),
    [
        ((), 0),
        ((Declaration("PredictionTime", "counter", "ms", ("ModelName", "Level")),), 0),
        ((Declaration("PredictionTime", "gauge", "ms", ("Level",)),), 1),
    ],
)
def test_the_time_in_handle_is_dropped_where_it_is_not_declared_as_it_should_be(
    declared: tuple[Declaration, ...], complaints: int, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(Declarations((), declared), auto_detect=True)
    meters = ModelMeters(metrics, "m", "2.0")
    meters.handled(0.5, ["a"])
    meters.handled(0.5, ["a"])
    assert samples(metrics) == {}
    assert len(caplog.messages) == complaints


def test_a_worker_is_named_as_torchserve_would_name_it() -> None:
    meters, metrics = make()
    meters.loaded(3, 1.309)
    assert samples(metrics) == {'WorkerLoadTime{WorkerName="W-9003-m_2.0",Level="Host",Hostname="here",}': "1309.0"}
