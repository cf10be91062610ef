"""Handlers as TorchServe's users write them, unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.servers import MODELS, RunningServer, server


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with server(MODELS / "ts_stream", MODELS / "custom", options=("--log-level", "debug")) as started:
        yield started


def test_an_intermediate_response_and_the_reduced_result(running: RunningServer) -> None:
    for _ in range(3):
        answer = running.predict("ts_stream", b"go", headers={"Content-Type": "application/octet-stream"})
        assert (answer.status, answer.body) == (200, b"0126")


def test_ranks_other_than_0_say_at_debug_that_they_send_nothing(running: RunningServer) -> None:
    running.predict("ts_stream", b"go")
    assert "ts_stream/0 rank 1 | DEBUG minserve.rank.loop: skip sending response at rank 1" in running.log
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
