"""Handlers as TorchServe's users write them, unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.servers import MODELS, RunningServer, call, server, until


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    models = [MODELS / name for name in ("ts_stream", "ts_async", "ts_rank0", "custom")]
    with server(*models, options=("--log-level", "debug")) as started:
        yield started


def test_an_intermediate_response_and_the_reduced_result(running: RunningServer) -> None:
    for _ in range(3):
        answer = running.predict("ts_stream", b"go", headers={"Content-Type": "application/octet-stream"})
        assert (answer.status, answer.body) == (200, b"0126")


def test_ranks_other_than_0_say_at_debug_that_they_send_nothing(running: RunningServer) -> None:
    running.predict("ts_stream", b"go")
    assert "ts_stream/0 rank 1 | DEBUG minserve.rank.outbox: skip sending response at rank 1" in running.log
    assert "skip sending response at rank 0" not in running.log


def test_a_prediction_exception_chooses_its_status_and_costs_no_restart(running: RunningServer) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    answer = running.predict("ts_stream", b"refuse", headers=headers)
    assert answer.status == 422
    assert "not today" in answer.message
    assert running.restarts("ts_stream") == 0
    assert running.predict("ts_stream", b"go", headers=headers).body == b"0126"


def test_custom_is_one_process_with_one_endpoint(running: RunningServer) -> None:
    answer = running.predict("custom", "x")
    assert (answer.body, answer.headers["content-type"]) == (b"0 of 1 in custom", "text/plain")
    assert len(running.pids("custom")) == 1


BINARY = {"Content-Type": "application/octet-stream"}


def test_rank_0_alone_is_called_and_its_failure_is_an_ordinary_one(running: RunningServer) -> None:
    assert running.predict("ts_rank0", b"go", headers=BINARY).body == b"call 1"
    refused = running.predict("ts_rank0", b"refuse", headers=BINARY)
    assert (refused.status, "not today" in refused.message) == (422, True)
    assert running.predict("ts_rank0", b"go", headers=BINARY).body == b"call 3"
    assert running.restarts("ts_rank0") == 0


def test_requests_of_an_async_handler_are_answered_in_any_order(running: RunningServer) -> None:
    def waiting() -> list[str]:
        found: list[str] = json.loads(running.predict("ts_async", b"waiting", headers=BINARY).body)
        return found

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.predict, "ts_async", b"first", headers=BINARY)
        second = pool.submit(running.predict, "ts_async", b"second", headers=BINARY)
        until(lambda: waiting() == ["first", "second"], 20.0, "both requests at the handler")
        assert running.predict("ts_async", b"stream", headers=BINARY).body == b"stream ends"
        for word, request in (("second", second), ("first", first)):
            assert running.predict("ts_async", f"wake {word}".encode(), headers=BINARY).body == b"woke"
            assert request.result().body == f"{word}: wake {word}".encode()
    with pytest.raises(TimeoutError):
        running.predict("ts_async", b"gone", headers=BINARY, timeout=0.2)
    until(lambda: waiting() == [], 20.0, "the end of the task whose client has left")


def test_what_a_prediction_leaves_in_the_metrics(running: RunningServer) -> None:
    def metrics() -> str:
        return call(f"{running.metrics}/metrics").body.decode()

    def of(name: str, *labels: str) -> list[float]:
        lines = (line for line in metrics().splitlines() if line.startswith(name))
        found = [line for line in lines if all(one in line for one in labels)]
        return [float(line.rpartition(" ")[2]) for line in found]

    inferences = of("ts_inference_requests_total{", 'model_name="ts_stream"')
    running.predict("ts_stream", b"go", headers=BINARY)
    assert of("ts_inference_requests_total{", 'model_name="ts_stream"') == [sum(inferences) + 1]
    assert len(of("ts_inference_latency_microseconds{", 'model_name="ts_stream"')) == 1
    until(lambda: len(of("HandlerTime{", 'ModelName="ts_stream"')) == 2, 10.0, "the metrics of both ranks")
    assert of("HandlerTime{", 'ModelName="ts_stream",Level="Model",Rank="1",') == [1.5]
    assert len(of("PredictionTime{", 'ModelName="ts_stream"')) == 1  # TorchServe has one for each rank
    assert len(of("WorkerLoadTime{")) == len(running.log.split(": ready after")) - 1
    until(lambda: of("CPUUtilization{") != [], 10.0, "the first look at the machine")
    assert of("minserve_request_seconds_count{", 'model_name="ts_stream"', 'stage="rank0"')[0] >= 1
