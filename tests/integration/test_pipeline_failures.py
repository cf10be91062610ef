"""Failures in a pipeline of three stages. A stage in front of the one that fails is the last to hear of it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.servers import MODELS, Answer, RunningServer, server, until

STAGES = 3
RUNS = 3
HANGS_S = 30  # responseTimeout


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with server(MODELS / "stages3", MODELS / "stages3x2") as started:
        yield started


@pytest.fixture
def stages(running: RunningServer) -> RunningServer:
    return warm(running, "stages3")


def warm(running: RunningServer, model: str) -> RunningServer:
    running.wait_until_ready(model)
    assert_right(ask(running, model, nonce=1), 1)  # the first batch of a worker travels alone
    return running


def ask(running: RunningServer, model: str, nonce: int, **order: object) -> Answer:
    return running.predict_json(model, {"nonce": nonce, "shape": [nonce % 5 + 1], **order})


def assert_right(answer: Answer, nonce: int, rounds: int = 1) -> None:
    expected = float(nonce)
    for _ in range(rounds):
        for stage in range(STAGES):
            expected = expected * 3 + stage + 1
    assert answer.status == 200, answer.text
    assert answer.json == {"nonce": nonce, "values": [expected], "shape": [nonce % 5 + 1]}


def assert_failed(answer: Answer, nonce: int) -> None:
    assert (answer.status, f"LookupError: told to by {nonce}" in answer.message) == (503, True), answer.text


@pytest.mark.parametrize("model", ["stages3", "stages3x2"])
@pytest.mark.parametrize("number", range(1, RUNS + 1))
@pytest.mark.parametrize("stage", range(STAGES))
def test_a_failure_of_any_stage_in_any_run_costs_its_own_request_alone(
    running: RunningServer, model: str, stage: int, number: int
) -> None:
    warm(running, model)
    restarts = running.restarts(model)
    assert_failed(ask(running, model, 7, rounds=RUNS, round=number, **{"raise": ["stage", stage]}), 7)
    assert_right(ask(running, model, 8, rounds=RUNS), 8, RUNS)
    assert running.restarts(model) == restarts


@pytest.mark.parametrize("model", ["stages3", "stages3x2"])
def test_among_many_requests_under_way_each_has_its_own_answer_or_its_own_failure(
    running: RunningServer, model: str
) -> None:
    warm(running, model)
    restarts = running.restarts(model)
    orders: list[dict[str, object]] = [{"rounds": rounds} for rounds in (1, 2, 3)]
    orders += [
        {"rounds": RUNS, "round": number, "raise": ["stage", stage]}
        for number in range(1, RUNS + 1)
        for stage in range(STAGES)
    ]
    orders.append({"rounds": 2, "raise": ["between", *range(6)]})
    orders = [orders[nonce * 5 % len(orders)] for nonce in range(5 * len(orders))]
    with ThreadPoolExecutor(8) as clients:
        calls = [clients.submit(ask, running, model, nonce, **order) for nonce, order in enumerate(orders)]
    for nonce, (order, call) in enumerate(zip(orders, calls, strict=True)):
        if "raise" in order:
            assert_failed(call.result(), nonce)
        else:
            assert_right(call.result(), nonce, int(str(order["rounds"])))
    assert running.restarts(model) == restarts


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_handler_may_catch_a_failure_and_run_on_or_not(stages: RunningServer, goes_on: bool) -> None:
    restarts = stages.restarts("stages3")
    for stage in range(STAGES):
        order = {"rounds": RUNS, "round": 1, "raise": ["stage", stage], "catch": "run on" if goes_on else "leave"}
        answer = ask(stages, "stages3", 7, **order)
        assert (answer.status, answer.json) == (200, {"caught": "LookupError: told to by 7"}), answer.text
    assert_right(ask(stages, "stages3", 8), 8)
    assert stages.restarts("stages3") == restarts


def test_no_collective_of_the_next_request_meets_one_behind_a_failure(stages: RunningServer) -> None:
    """The stage in front of the one that fails does not know, and waits for the others in a collective."""
    restarts = stages.restarts("stages3")
    assert_failed(ask(stages, "stages3", 2, **{"raise": ["stage", 2], "talk": ["after", 0, 1, 2]}), 2)
    assert_right(ask(stages, "stages3", 3, talk=["before", 0, 1, 2]), 3)
    stages.wait_until_ready("stages3", restarts + 1)
    assert re.search(r"stages3/0: rank 2 \(pid \d+\) raised LookupError: told to by 2", stages.log)


@pytest.mark.parametrize("rank", range(STAGES))
def test_an_exception_between_two_runs_on_one_rank_is_named_and_costs_a_restart(
    stages: RunningServer, rank: int
) -> None:
    restarts = stages.restarts("stages3")
    answer = ask(stages, "stages3", 2, rounds=2, **{"raise": ["between", rank]})
    assert_failed(answer, 2)
    assert f"rank {rank}" in answer.message
    stages.wait_until_ready("stages3", restarts + 1)
    assert_right(ask(stages, "stages3", 5), 5)


@pytest.mark.parametrize("rank", range(STAGES))
def test_a_stage_that_dies_in_the_middle_of_a_run_is_named(stages: RunningServer, tmp_path: Path, rank: int) -> None:
    restarts = stages.restarts("stages3")
    pid = stages.pids("stages3")[rank]
    begun = tmp_path / "begun"
    dies = {"rounds": RUNS, "round": 2, "touch": ["stage", rank], "file": str(begun), "hang": ["stage", rank]}
    with ThreadPoolExecutor(4) as clients:
        calls = [clients.submit(ask, stages, "stages3", nonce, rounds=RUNS) for nonce in (2, 3)]
        calls.append(clients.submit(ask, stages, "stages3", 4, **dies))
        until(begun.exists, HANGS_S, "the run to begin")
        os.kill(pid, signal.SIGKILL)
    for nonce, call in enumerate(calls, 2):
        answer = call.result()
        if answer.status == 200:
            assert_right(answer, nonce, RUNS)
        else:
            assert f"rank {rank} (pid {pid}) was killed by SIGKILL" in answer.message
    assert calls[-1].result().status == 503
    stages.wait_until_ready("stages3", restarts + 1)
    assert_right(ask(stages, "stages3", 5), 5)
