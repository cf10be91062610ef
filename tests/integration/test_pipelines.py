"""Several requests in a pipeline at once: that they are, each with its own answer, and what a fault does to the others."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.servers import MODELS, Answer, RunningServer, server, until

SHAPES = [[1], [3, 5], [64, 7], [2, 2, 2], [1, 300]]


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with server(MODELS / "stages", MODELS / "stages4") as started:
        yield started


@pytest.fixture
def stages(running: RunningServer) -> RunningServer:
    running.wait_until_ready("stages")
    assert_right(ask(running, "stages", nonce=1), 1)  # the first batch of a worker travels alone
    return running


def ask(running: RunningServer, model: str, nonce: int, **order: object) -> Answer:
    return running.predict_json(model, {"nonce": nonce, "shape": SHAPES[nonce % len(SHAPES)], **order})


def assert_right(answer: Answer, nonce: int, rounds: int = 1, shape: list[int] | None = None) -> None:
    expected = float(nonce)
    for _ in range(rounds):
        expected = (expected * 3 + 1) * 3 + 2
    assert answer.status == 200, answer.text
    assert answer.json == {"nonce": nonce, "values": [expected], "shape": shape or SHAPES[nonce % len(SHAPES)]}
    assert answer.headers["X-Nonce"] == str(nonce)


@pytest.mark.parametrize("place", ["before", "stage", "after"])
def test_the_first_stage_begins_the_next_request_while_a_later_one_is_at_work(
    stages: RunningServer, tmp_path: Path, place: str
) -> None:
    file = str(tmp_path / "begun")
    with ThreadPoolExecutor() as clients:
        first = clients.submit(ask, stages, "stages", 2, **{"await": [place, 1], "file": file})
        second = clients.submit(ask, stages, "stages", 3, **{"await": ["stage", 1], "file": file})
        third = clients.submit(ask, stages, "stages", 4, touch=["stage", 0], file=file)
        for nonce, call in ((2, first), (3, second), (4, third)):
            assert_right(call.result(), nonce)


@pytest.mark.parametrize(
    ("rows", "requests"),
    [pytest.param(500, 20, id="4 MB"), pytest.param(2000, 6, id="16 MB, more than a socket takes at once")],
)
def test_a_stage_may_return_the_same_memory_for_every_request(stages: RunningServer, rows: int, requests: int) -> None:
    def call(nonce: int) -> object:
        order = {"nonce": nonce, "shape": [rows, 2000], "reuse": True, "sleep": ["stage", 1]}
        return stages.predict_json("stages", order).json

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(call, range(requests)))
    assert answers == [
        {"nonce": nonce, "values": [float(nonce * 9 + 5)], "shape": [rows, 2000]} for nonce in range(requests)
    ]


ORDERS: list[dict[str, object]] = [
    {},
    {"raise": ["stage", 0]},
    {},
    {"raise": ["stage", 1]},
    {"rounds": 3},
    {"raise": ["before", 0, 1, 2, 3]},
    {"sleep": ["stage", 1]},
    {"raise": ["after", 0, 1, 2, 3]},
    {"rounds": 0, "raise": ["after", 0, 1, 2, 3]},
]


@pytest.mark.parametrize(("model", "requests"), [("stages", 200), ("stages4", 60)])
def test_every_request_among_many_has_its_own_answer_or_its_own_failure(
    running: RunningServer, model: str, requests: int
) -> None:
    running.wait_until_ready(model)
    restarts = running.restarts(model)
    orders = [ORDERS[nonce % len(ORDERS)] for nonce in range(requests)]
    with ThreadPoolExecutor(16) as clients:
        calls = [clients.submit(ask, running, model, nonce, **order) for nonce, order in enumerate(orders)]
    for nonce, (order, call) in enumerate(zip(orders, calls, strict=True)):
        answer = call.result()
        if "raise" in order:
            assert (answer.status, f"LookupError: told to by {nonce}" in answer.message) == (503, True), answer.text
        else:
            assert_right(answer, nonce, 3 if "rounds" in order else 1)
    assert running.restarts(model) == restarts


def test_collectives_around_the_pipeline_meet_those_of_the_same_request(stages: RunningServer) -> None:
    with ThreadPoolExecutor(8) as clients:
        talks: list[dict[str, object]] = [{}, {"talk": ["before", 0, 1]}]
        calls = [clients.submit(ask, stages, "stages", nonce, **talks[nonce % 2]) for nonce in range(24)]
        for nonce, call in enumerate(calls):
            assert_right(call.result(), nonce)


def test_a_collective_meets_a_last_stage_whose_large_results_nobody_takes_meanwhile(tmp_path: Path) -> None:
    model = tmp_path / "four"
    shutil.copytree(MODELS / "stages", model)
    with (model / "model-config.yaml").open("a") as config:
        config.write("  inFlight: 4\n")
    large = [1500, 2000]  # 12 MB, more than a socket ever takes at once
    with server(model) as running, ThreadPoolExecutor(4) as clients:
        running.wait_until_ready("four")
        assert_right(ask(running, "four", nonce=1), 1)
        release = tmp_path / "release"
        calls = [clients.submit(ask, running, "four", 2, **{"await": ["stage", 1], "file": str(release)}, shape=large)]
        until(lambda: running.states("four") == ["BUSY"], 20, "the first one to be under way")
        for nonce, talk in ((3, {}), (4, {}), (5, {"talk": ["before", 0, 1]})):
            begun = tmp_path / f"begun{nonce}"
            calls.append(
                clients.submit(ask, running, "four", nonce, touch=["before", 0], file=str(begun), shape=large, **talk)
            )
            until(begun.exists, 20, f"request {nonce} to begin")
        release.touch()
        for nonce, call in enumerate(calls, 2):
            assert_right(call.result(), nonce, shape=large)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("shape", [[3], [1000, 2000]])
def test_a_rank_that_dies_takes_what_is_in_the_pipeline_along_and_is_named(
    stages: RunningServer, rank: int, shape: list[int]
) -> None:
    restarts = stages.restarts("stages")
    pid = stages.pids("stages")[rank]
    with ThreadPoolExecutor(8) as clients:
        order = {"sleep": ["stage", 1], "shape": shape}
        calls = [clients.submit(ask, stages, "stages", nonce, **order) for nonce in range(30)]
        calls[3].result()
        os.kill(pid, signal.SIGKILL)
    failed = 0
    for nonce, call in enumerate(calls):
        answer = call.result()
        if answer.status == 200:
            assert_right(answer, nonce, shape=shape)
        else:
            assert f"rank {rank} (pid {pid}) was killed by SIGKILL" in answer.message
            failed += 1
    assert failed
    stages.wait_until_ready("stages", restarts + 1)
    assert_right(ask(stages, "stages", 5), 5)


@pytest.mark.parametrize(("place", "rank"), [("before", 1), ("after", 0)])
def test_an_exception_outside_of_the_stages_on_some_ranks_is_named_and_costs_a_restart(
    stages: RunningServer, place: str, rank: int
) -> None:
    restarts = stages.restarts("stages")
    with ThreadPoolExecutor(4) as clients:
        bad = clients.submit(ask, stages, "stages", 2, **{"raise": [place, rank]})
        others = [clients.submit(ask, stages, "stages", nonce) for nonce in (3, 4, 5)]
        answer = bad.result()
    assert answer.status == 503
    assert f"rank {rank}" in answer.message
    assert "LookupError: told to by 2" in answer.message
    assert all(call.result().status in (200, 503) for call in others)
    stages.wait_until_ready("stages", restarts + 1)
    assert_right(ask(stages, "stages", 5), 5)


def test_a_drain_lets_all_that_is_in_the_pipeline_finish(stages: RunningServer) -> None:
    with ThreadPoolExecutor(3) as clients:
        calls = [clients.submit(ask, stages, "stages", nonce, sleep=["stage", 1]) for nonce in range(3)]
        until(lambda: stages.workers("stages")[0]["state"] == "BUSY", 5, "requests to be under way")
        stages.stop()
        for nonce, call in enumerate(calls):
            assert_right(call.result(), nonce)
