"""Streams over two real ranks: slow clients, clients that leave, ranks that die, and that the ranks stay in step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.integration.servers import MODELS, RunningServer, call, server, until


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with server(MODELS / "streaming") as started:
        yield started


def open_stream(running: RunningServer, read_buffer: int = 0, **order: object) -> socket.socket:
    """Asks for a stream and reads nothing of it yet."""
    address = urlsplit(running.inference)
    assert address.hostname is not None
    assert address.port is not None
    client = socket.socket()
    if read_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_buffer)
    client.settimeout(20)
    client.connect((address.hostname, address.port))
    body = json.dumps(order)
    client.sendall(
        f"POST /predictions/streaming HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    return client


def read_to_the_end(client: socket.socket) -> bytes:
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        data = client.recv(65536)
        assert data, f"broken off after {received[-100:]!r}"
        received += data
    return received


def look(running: RunningServer) -> list[list[int]]:
    """[steps, cleaned up, probes] of each rank. An answer says that no stream is at work any more."""
    answer = running.predict("streaming", '{"do": "look"}', timeout=30.0)
    assert answer.status == 200, answer.message
    ranks: list[list[int]] = json.loads(answer.body)
    return ranks


def assert_in_step(running: RunningServer) -> list[int]:
    first, second = look(running)
    assert first == second
    for value in (1, 2, 3):
        assert running.predict("streaming", f'{{"do": "add", "value": {value}}}').json == {"sum": 2.0 * value}
    return first


@pytest.mark.parametrize("how", ["generate", "from_a_thread", "rank_0_alone"])
def test_a_stream_of_many_steps_comes_whole(running: RunningServer, how: str) -> None:
    answer = running.predict("streaming", json.dumps({"do": how, "steps": 100}))
    assert answer.body in (b"x" * 100, b"x" * 100 + b"end")
    assert assert_in_step(running)[0] == 100


def test_a_client_that_accepts_events_gets_each_step_as_one(running: RunningServer) -> None:
    order = json.dumps({"do": "generate", "steps": 3})
    answer = running.predict("streaming", order, headers={"Accept": "text/event-stream"})
    assert answer.body == b"data: x\n\n" * 3
    assert_in_step(running)


@pytest.mark.parametrize("how", ["generate", "from_a_thread"])
def test_a_client_that_leaves_ends_the_stream_on_every_rank_at_the_same_step(running: RunningServer, how: str) -> None:
    restarts = running.restarts("streaming")
    with open_stream(running, do=how, steps=1_000_000, pause=0.001) as client:
        assert b"HTTP/1.1 200 " in client.recv(4096)
    steps, cleaned_up, _ = assert_in_step(running)
    assert 0 < steps < 100_000
    assert cleaned_up == 1
    assert running.restarts("streaming") == restarts
    kinds = [event["kind"] for event in events(running)]
    assert kinds[-1] == "stream-cancelled"


def test_a_client_that_leaves_before_the_first_chunk(running: RunningServer) -> None:
    with open_stream(running, do="generate", steps=1_000_000, pause=0.3) as client:
        until(lambda: running.states("streaming") == ["BUSY"])
        client.shutdown(socket.SHUT_RD)
    steps, cleaned_up, _ = assert_in_step(running)
    assert (steps < 100, cleaned_up) == (True, 1)


def test_a_handler_that_sends_on_rank_0_alone_runs_on_for_nobody(running: RunningServer) -> None:
    with open_stream(running, do="rank_0_alone", steps=300, pause=0.002) as client:
        assert b"HTTP/1.1 200 " in client.recv(4096)
    assert assert_in_step(running)[:2] == [300, 0]


def test_a_client_that_reads_slowly_gets_all_of_it(running: RunningServer) -> None:
    size, steps = 50_000, 100
    with open_stream(running, read_buffer=4096, do="generate", steps=steps, size=size) as client:
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += client.recv(200_000)
            time.sleep(0.001)
    assert received.count(b"x" * size) == steps
    assert assert_in_step(running)[0] == steps


def test_a_client_that_reads_nothing_holds_the_ranks_and_is_gone_after_stream_stall_timeout(
    running: RunningServer,
) -> None:
    restarts = running.restarts("streaming")
    with open_stream(running, read_buffer=4096, do="generate", steps=100_000, size=50_000) as client:
        steps, cleaned_up, _ = assert_in_step(running)  # answered once the stream is over
        assert steps < 1000, "what nobody reads must not be produced"
        assert cleaned_up == 1
        with pytest.raises((ConnectionError, AssertionError)):
            read_to_the_end(client)
    assert running.restarts("streaming") == restarts


def test_a_rank_that_dies_in_mid_stream_breaks_it_off_visibly(running: RunningServer) -> None:
    restarts = running.restarts("streaming")
    with open_stream(running, do="generate", steps=1_000_000, pause=0.01) as client:
        assert b"HTTP/1.1 200 " in client.recv(4096)
        os.kill(running.pids("streaming")[1], signal.SIGKILL)
        with pytest.raises((ConnectionError, AssertionError)):
            read_to_the_end(client)
    running.wait_until_ready("streaming", restarts + 1)
    assert_in_step(running)


def test_quick_steps_that_are_granted_far_ahead_come_in_order_and_end_in_step(tmp_path: Path) -> None:
    """As by default: the other tests' model has its steps ahead fixed."""
    model = tmp_path / "streaming"
    shutil.copytree(MODELS / "streaming", model)
    config = model / "model-config.yaml"
    config.write_text(config.read_text().replace("  streamAhead: 4\n", ""))
    with server(model) as running:
        for how in ("generate", "from_a_thread"):
            answer = running.predict("streaming", json.dumps({"do": how, "steps": 2000, "numbered": True}))
            assert answer.body.removesuffix(b"end") == b"".join(b"%d " % number for number in range(1, 2001))
        for received in (1, 100, 10_000):
            with open_stream(running, do="generate", steps=1_000_000, numbered=True) as client:
                while received > 0:
                    received -= len(client.recv(1000))
            assert assert_in_step(running)[1] == 1
        assert running.restarts("streaming") == 0


def test_a_request_in_flight_is_sent_again_where_the_model_allows_it(running: RunningServer, tmp_path: Path) -> None:
    restarts = running.restarts("streaming")
    order = {"do": "die_once", "file": str(tmp_path / "died"), "value": 4}
    answer = running.predict("streaming", json.dumps(order))
    assert answer.json == {"sum": 8.0}
    assert running.restarts("streaming") == restarts + 1


def test_every_worker_is_probed_before_it_is_ready(running: RunningServer) -> None:
    assert assert_in_step(running)[2] == 1


def test_the_faults_of_all_that_are_events(running: RunningServer) -> None:
    found = {event["kind"]: event for event in events(running)}
    died = found["rank-died"]
    assert (died["model"], died["worker"], died["rank"]) == ("streaming", 0, 1)
    assert isinstance(died["pid"], int)
    assert f"streaming/0: rank 1 (pid {died['pid']}) exited with code 9" == died["detail"]
    assert {"ready", "restart", "rank-died", "stream-cancelled"} <= found.keys()


def events(running: RunningServer) -> list[dict[str, object]]:
    answer = call(f"{running.management}/models/streaming/events").json
    assert isinstance(answer, dict)
    found: list[dict[str, object]] = answer["events"]
    return found
