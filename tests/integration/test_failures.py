"""What clients see when a rank fails, and that right answers follow. One server; each fault finds it healthy again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import psutil
import pytest

from tests.integration.servers import GONE_S, MODELS, Answer, RunningServer, gone, server, until


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with server(MODELS / "faulty", MODELS / "slow") as started:
        yield started


@pytest.fixture
def faulty(running: RunningServer) -> RunningServer:
    running.wait_until_ready("faulty")
    assert running.predict("faulty", '{"value": 1}').json == {"sum": 2.0}
    return running


def assert_right_again(running: RunningServer, restarts: int) -> None:
    running.wait_until_ready("faulty", restarts)
    for value in range(5):
        assert running.predict("faulty", f'{{"value": {value}}}').json == {"sum": 2.0 * value}


def in_background(running: RunningServer, body: str) -> tuple[threading.Thread, list[Answer]]:
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(running.predict("faulty", body)))
    thread.start()
    return thread, answers


@pytest.mark.parametrize(
    ("order", "status", "text"),
    [
        ('{"do": "fail", "ranks": [0, 1]}', 503, "ValueError: told to fail"),
        ('{"bad": "count"}', 503, "1 requests, 2 answers"),
        ('{"bad": "type"}', 503, "Unsupported model output data type"),
        ("no json", 503, "JSONDecodeError"),
    ],
)
def test_a_failure_in_step_costs_one_request_and_no_restart(
    faulty: RunningServer, order: str, status: int, text: str
) -> None:
    restarts, pids = faulty.restarts("faulty"), faulty.pids("faulty")
    answer = faulty.predict("faulty", order)
    assert answer.status == status
    assert text in answer.message
    assert "rank 0" in answer.message
    assert "Traceback" not in answer.message
    assert_right_again(faulty, restarts)
    assert faulty.pids("faulty") == pids


@pytest.mark.parametrize(
    ("order", "status", "texts"),
    [
        pytest.param(
            '{"do": "fail", "ranks": [1], "own_text": 1}', 503, ["rank 1", "told to fail on rank 1"], id="raise-1"
        ),
        pytest.param(
            '{"do": "fail", "ranks": [0], "own_text": 1}', 503, ["rank 0", "told to fail on rank 0"], id="raise-0"
        ),
        pytest.param('{"do": "fail_each", "ranks": [0, 1]}', 503, ["rank", "own"], id="raise-different"),
        pytest.param('{"do": "shift"}', 503, ["rank", "share out of range"], id="raise-shifted"),
        pytest.param(
            '{"do": "hang", "ranks": [1]}',
            504,
            ["rank 1 (pid", "outside torch.distributed", "while rank 0 waits", "within 3 s"],
            id="hang-1",
        ),
        pytest.param(
            '{"do": "stop", "ranks": [1]}', 504, ["rank 1 (pid", "is stopped", "stallTimeout (2 s)"], id="stop-1"
        ),
        pytest.param(
            '{"do": "gil", "ranks": [0]}', 504, ["rank 0 (pid", "no heartbeat", "holds the GIL", "in gil"], id="gil-0"
        ),
        pytest.param(
            '{"without": [1]}', 504, ["rank 1 (pid", "has left batch", "while rank 0 waits"], id="without-collective-1"
        ),
        pytest.param('{"do": "leave", "ranks": [1], "code": 7}', 503, ["rank 1", "exited with code 7"], id="exit-7"),
        pytest.param('{"do": "leave", "ranks": [1]}', 503, ["rank 1", "exited with code 0"], id="exit-0"),
        pytest.param('{"do": "leave", "ranks": [0], "code": 137}', 507, ["rank 0", "137"], id="exit-137"),
        pytest.param('{"do": "kill", "ranks": [0]}', 503, ["rank 0", "SIGKILL"], id="kill-0"),
        pytest.param('{"do": "kill", "ranks": [1]}', 503, ["rank 1", "SIGKILL"], id="kill-1"),
        pytest.param('{"do": "segfault", "ranks": [1]}', 503, ["rank 1", "SIGSEGV"], id="segfault"),
        pytest.param('{"do": "close_socket", "ranks": [1]}', 503, ["rank 1"], id="close-socket"),
        pytest.param('{"do": "garbage", "ranks": [1]}', 502, ["rank 1", "not a minserve frame"], id="garbage"),
    ],
)
def test_a_failure_out_of_step_names_the_rank_and_restarts_the_worker(
    faulty: RunningServer, order: str, status: int, texts: list[str]
) -> None:
    restarts, family = faulty.restarts("faulty"), [psutil.Process(pid) for pid in faulty.pids("faulty")]
    answer = faulty.predict("faulty", order)
    assert answer.status == status, answer.message
    assert "faulty/0" in answer.message
    for text in texts:
        assert text in answer.message
    assert "Traceback" not in answer.message
    assert answer.headers.get("Retry-After")
    until(lambda: gone(family), GONE_S, "the old ranks' end")
    assert_right_again(faulty, restarts + 1)
    error = faulty.workers("faulty")[0]["lastError"]
    assert isinstance(error, str)
    assert error == answer.message


def test_a_rank_that_stops_while_idle_is_found_and_its_stack_asked_for(faulty: RunningServer) -> None:
    restarts, stopped = faulty.restarts("faulty"), faulty.pids("faulty")[0]
    os.kill(stopped, signal.SIGSTOP)
    until(lambda: faulty.restarts("faulty") == restarts + 1, 15)
    error = str(faulty.workers("faulty")[0]["lastError"])
    assert f"rank 0 (pid {stopped}) is stopped" in error
    assert "rank 1 (pid" in faulty.log
    assert "in receive" in faulty.log, "the other rank's stack: it waits for a batch"
    assert_right_again(faulty, restarts + 1)


def test_torchrun_killed_under_a_request(faulty: RunningServer) -> None:
    restarts, ranks = faulty.restarts("faulty"), faulty.pids("faulty")
    thread, answers = in_background(faulty, '{"do": "hang", "ranks": [1]}')
    until(lambda: faulty.states("faulty") == ["BUSY"])
    os.kill(psutil.Process(ranks[0]).ppid(), signal.SIGKILL)
    thread.join(10)
    assert answers[0].status == 503
    assert "torchrun" in answers[0].message
    assert "SIGKILL" in answers[0].message
    until(lambda: not any(psutil.pid_exists(pid) for pid in ranks), GONE_S, "the orphans' end")
    assert_right_again(faulty, restarts + 1)


def test_what_a_rank_has_started_dies_with_it(faulty: RunningServer) -> None:
    restarts = faulty.restarts("faulty")
    faulty.predict("faulty", '{"do": "grandchild", "ranks": [0, 1]}')
    ranks = [psutil.Process(pid) for pid in faulty.pids("faulty")]
    children = [child for rank in ranks for child in rank.children()]
    assert len(children) == 2
    faulty.predict("faulty", '{"do": "kill", "ranks": [0]}')
    until(lambda: gone(children), GONE_S, "the grandchildren's end")
    assert_right_again(faulty, restarts + 1)


def test_queued_requests_wait_for_the_next_worker(faulty: RunningServer) -> None:
    restarts = faulty.restarts("faulty")
    first, dying = in_background(faulty, '{"do": "sleep", "ranks": [0, 1], "seconds": 2, "after": [0], "value": 1}')
    until(lambda: faulty.states("faulty") == ["BUSY"])
    others = [in_background(faulty, '{"value": 21}') for _ in range(20)]
    # Some may lie in the ranks' sockets already, 15 at most: no rank has begun them, so they wait, too.
    waits = [{"remainingCapacity": 100 - count, "pendingRequests": count} for count in range(5, 21)]
    until(lambda: faulty.describe("faulty")["jobQueueStatus"] in waits)
    os.kill(faulty.pids("faulty")[1], signal.SIGKILL)
    first.join(30)
    assert dying[0].status == 503
    for other, waiting in others:
        other.join(30)
        assert waiting[0].json == {"sum": 42.0}
    assert_right_again(faulty, restarts + 1)


def test_a_stopped_rank_that_goes_on_has_lost_nothing(faulty: RunningServer) -> None:
    """One link slowed down: the worker waits for it, nothing is swapped, and it resumes."""
    restarts, slow = faulty.restarts("faulty"), faulty.pids("faulty")[1]
    os.kill(slow, signal.SIGSTOP)
    started = [in_background(faulty, f'{{"value": {value}}}') for value in range(8)]
    until(lambda: faulty.states("faulty") == ["BUSY"])
    os.kill(slow, signal.SIGCONT)
    for value, (thread, answers) in enumerate(started):
        thread.join(10)
        assert answers[0].json == {"sum": 2.0 * value}
    assert_right_again(faulty, restarts)


def test_several_workers_share_one_bounded_queue(running: RunningServer) -> None:
    running.wait_until_ready("slow")
    until(lambda: running.states("slow") == ["READY", "READY"])
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda: answers.append(running.predict("slow", "1"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    served = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 503]
    assert (len(served), len(refused)) == (5, 3)  # two in work, three in the queue
    assert {int(answer.body) for answer in served} == {*running.pids("slow", 0), *running.pids("slow", 1)}
    assert all("jobQueueSize" in answer.message for answer in refused)


def test_a_client_that_leaves_leaves_the_queue(running: RunningServer) -> None:
    until(lambda: running.states("slow") == ["READY", "READY"])
    busy = [threading.Thread(target=lambda: running.predict("slow", "3")) for _ in range(2)]
    for thread in busy:
        thread.start()
    until(lambda: running.states("slow") == ["BUSY", "BUSY"])
    with pytest.raises(TimeoutError):
        running.predict("slow", "0", timeout=0.3)
    until(lambda: running.describe("slow")["jobQueueStatus"] == {"remainingCapacity": 3, "pendingRequests": 0})
    assert running.states("slow") == ["BUSY", "BUSY"], "it left before a worker could take it"
    for thread in busy:
        thread.join(10)


def test_a_rank_that_takes_no_more_batches_fails_its_worker() -> None:
    """Rank 0 goes on answering; the rank that stands still is found by its full socket."""
    with server(MODELS / "bulky") as running:
        running.wait_until_ready("bulky")
        os.kill(running.pids("bulky")[1], signal.SIGSTOP)
        body, headers = b"x" * 1_000_000, {"Content-Type": "application/octet-stream"}
        answers = [running.predict("bulky", body, headers=headers) for _ in range(3)]
        assert answers[0].body == b"1000000"
        until(lambda: running.restarts("bulky") == 1, 20.0)
        assert "rank 1" in str(running.workers("bulky")[0]["lastError"])
        assert "has taken no batch for 2 s" in str(running.workers("bulky")[0]["lastError"])
        running.wait_until_ready("bulky")
        assert running.predict("bulky", body, headers=headers).body == b"1000000"


def test_a_full_link_is_waited_for_and_nothing_is_lost() -> None:
    """One link slowed down until it has no room: the worker waits for that rank, and then goes on."""
    with server(MODELS / "bulky") as running:
        running.wait_until_ready("bulky")
        slow = running.pids("bulky")[1]
        os.kill(slow, signal.SIGSTOP)
        headers = {"Content-Type": "application/octet-stream"}
        answers: dict[int, Answer] = {}

        def send(size: int) -> None:
            answers[size] = running.predict("bulky", b"x" * size, headers=headers)

        threads = [threading.Thread(target=send, args=(1_000_000 + number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        until(lambda: running.describe("bulky")["jobQueueStatus"] != {"remainingCapacity": 100, "pendingRequests": 0})
        os.kill(slow, signal.SIGCONT)
        for thread in threads:
            thread.join(20)
        assert {size: answer.body for size, answer in answers.items()} == {
            1_000_000 + number: str(1_000_000 + number).encode() for number in range(6)
        }
        assert running.restarts("bulky") == 0
