"""Two frontend processes in front of one server: that nobody can tell, and what happens when one of them is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest

from tests.integration.servers import DEMO_MODELS, MODELS, RunningServer, call, gone, server, until

TWO = ("--frontends", "2")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model `helpers` as one plain process, which starts in a fraction of a second."""
    model: Path = tmp_path_factory.mktemp("models") / "single"
    shutil.copytree(MODELS / "helpers", model)
    (model / "model-config.yaml").write_text("maxBatchDelay: 0\nminserve: {exitTimeout: 2}\n")
    return model


@pytest.fixture(scope="module")
def running(single: Path) -> Iterator[RunningServer]:
    with server(DEMO_MODELS / "echo", MODELS / "floods", single, options=TWO) as started:
        yield started
        assert "Traceback" not in started.log


def frontends(running: RunningServer) -> list[psutil.Process]:
    found = []
    for process in running.family():
        with contextlib.suppress(psutil.Error):
            if "minserve.frontends" in process.cmdline():
                found.append(process)
    return found


def connect(running: RunningServer, stack: ExitStack) -> socket.socket:
    url = urlsplit(running.inference)
    client = stack.enter_context(socket.create_connection((url.hostname, url.port), 20))
    return client


def ask(client: socket.socket, body: bytes) -> bytes:
    client.sendall(b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    answer = b""
    while not answer.endswith(b"\r\n\r\n" + body):
        received = client.recv(65536)
        if not received:
            raise ConnectionError("the server has hung up")
        answer += received
    return answer


class Load:
    """Clients that keep their connections, and count what becomes of their requests."""

    def __init__(self, running: RunningServer, clients: int) -> None:
        self.answered = 0
        self.lost = 0
        self._running = running
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def _run(self, number: int) -> None:
        nonce = 0
        while not self._over.is_set():
            with ExitStack() as stack:
                try:
                    client = connect(self._running, stack)
                    while not self._over.is_set():
                        nonce += 1
                        ask(client, b"%d-%d" % (number, nonce))
                        self.answered += 1
                except ConnectionError:
                    self.lost += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        until(lambda: self.answered > 10 * len(self._threads))
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


def counted(running: RunningServer, sample: str) -> float:
    """The sum of a sample's series in /metrics."""
    text = call(f"{running.metrics}/metrics").text
    return sum(float(value) for value in re.findall(rf"^{sample}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE))


def test_connections_that_stay_are_shared_out_about_evenly(running: RunningServer) -> None:
    with ExitStack() as stack:
        for _ in range(24):
            ask(connect(running, stack), b"hello")
        counts = [
            sum(one.status == psutil.CONN_ESTABLISHED for one in process.net_connections("tcp"))
            for process in frontends(running)
        ]
    # On a busy machine the process with fewer is not always awake in the moment that the other one leaves it.
    assert min(counts) >= 8


@pytest.mark.asyncio
async def test_every_client_gets_its_own_answer_and_all_are_counted(running: RunningServer) -> None:
    before = [counted(running, name) for name in ("Requests2XX", "ts_inference_requests_total")]
    nonces = iter(range(1000))

    async def client(session: aiohttp.ClientSession) -> None:
        for nonce in nonces:
            async with session.post(f"{running.inference}/predictions/echo", data=b"%d" % nonce) as answer:
                assert (answer.status, await answer.read()) == (200, b"%d" % nonce)

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        for _ in range(32):
            group.create_task(client(session))
    after = [counted(running, name) for name in ("Requests2XX", "ts_inference_requests_total")]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1002, 1000]  # two scrapes among them
    text = call(f"{running.metrics}/metrics").text
    in_frontends = re.search(r'_count\{model_name="echo",model_version="1.0",stage="frontend"\} (\S+)', text)
    in_queue = re.search(r'_count\{model_name="echo",model_version="1.0",stage="queue"\} (\S+)', text)
    assert in_frontends is not None
    assert in_queue is not None
    assert in_frontends[1] == in_queue[1]


def test_what_management_changes_is_so_at_once_for_all(running: RunningServer) -> None:
    """No frontend process may answer with what was true a moment ago."""
    try:
        for _ in range(3):
            assert call(f"{running.management}/models/single?min_worker=0", method="PUT").status == 202
            until(lambda: running.states("single") == [])
            assert [running.predict("single").status for _ in range(4)] == [503] * 4
            url = f"{running.management}/models/single?min_worker=1&synchronous=true"
            assert call(url, method="PUT", timeout=20).status == 200
            order = {"do": "echo", "text": "back"}
            assert [running.predict_json("single", order).body for _ in range(4)] == [b"back"] * 4
    finally:
        call(f"{running.management}/models/single?min_worker=1&synchronous=true", method="PUT", timeout=20)


def test_what_is_no_prediction_is_answered_by_the_server(running: RunningServer) -> None:
    assert call(f"{running.inference}/ping").json == {"status": "Healthy"}
    assert call(f"{running.inference}/readyz").json == {"status": "ready"}
    assert call(f"{running.inference}/v2/models/echo/ready").json == {"name": "echo", "ready": True}
    head = call(f"{running.inference}/readyz", method="HEAD")
    assert (head.status, head.body) == (200, b"")
    refused = call(f"{running.inference}/predictions/echo", method="TRACE")
    assert (refused.status, refused.headers["Allow"]) == (405, "DELETE, GET, OPTIONS, PATCH, POST, PUT")
    assert call(f"{running.inference}/nowhere", b"x" * 5_000_000).status == 404


def test_a_frontend_process_that_is_killed_takes_its_own_clients_along_and_comes_back(running: RunningServer) -> None:
    victim, other = frontends(running)
    with Load(running, 8) as load:
        victim.kill()
        until(lambda: load.lost >= 1)
        answered = load.answered
        until(lambda: load.answered > answered + 500)
        until(lambda: len(frontends(running)) == 2 and f"(pid {victim.pid}) exited with code -9" in running.log)
    assert load.lost <= 8, "those of the other process must not notice"
    assert other.is_running()
    assert running.restarts("echo") == 0
    with ExitStack() as stack:
        until(lambda: all(ask(connect(running, stack), b"x") for _ in range(2)))
    until(lambda: counted(running, "minserve_in_flight_bytes") == 0)


def test_a_frontend_process_that_is_stopped_is_ended_and_its_clients_do_not_wait_for_ever() -> None:
    with server(DEMO_MODELS / "echo", options=TWO) as running, ExitStack() as stack:
        victim, other = frontends(running)
        clients = [connect(running, stack) for _ in range(6)]
        for client in clients:
            ask(client, b"hello")
        victim.send_signal(signal.SIGSTOP)
        lost = 0
        for client in clients:
            try:
                ask(client, b"hello")  # waits at most 20 s, see `connect`
            except ConnectionError:
                lost += 1
        assert 1 <= lost < len(clients)
        assert other.is_running()
        until(lambda: len(frontends(running)) == 2 and victim not in frontends(running))
        silent = rf"frontend process \d \(pid {victim.pid}\): has given no sign of life for 10 s"
        assert re.search(silent, running.log)


def test_a_client_that_leaves_its_stream_ends_it(running: RunningServer) -> None:
    with ExitStack() as stack:
        client = connect(running, stack)
        client.sendall(b"POST /predictions/floods HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\n1000000")
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert running.states("floods") == ["BUSY"]
    until(lambda: running.states("floods") == ["READY"])
    assert running.predict("floods", b"3").body == b"x" * 3 * 65536


def test_sigterm_lets_finish_what_is_in_flight_on_every_frontend_process(single: Path) -> None:
    answers: list[int] = []

    def order() -> None:
        answers.append(started.predict_json("single", {"do": "sleep", "seconds": 1}).status)

    with server(single, options=TWO) as started:
        processes = [psutil.Process(started.process.pid), *started.family()]
        threads = [threading.Thread(target=order) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: counted(started, "minserve_queue_requests") == 3)
        for process in frontends(started):  # as a service manager does it, which knows nothing of who is whose
            process.terminate()
        started.process.terminate()
        for thread in threads:
            thread.join(30)
        assert started.process.wait(20) == 0
        until(lambda: gone(processes))
        assert "exited" not in started.log
    assert sorted(answers) == [200, 503, 503, 503]  # one in flight, three in the queue


def test_a_server_that_is_killed_leaves_no_frontend_process(single: Path) -> None:
    with server(single, options=TWO) as running, ExitStack() as stack:
        client = connect(running, stack)
        client.sendall(b"POST /predictions/single HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        processes = running.family()
        assert len(frontends(running)) == 2
        os.kill(running.process.pid, signal.SIGKILL)
        until(lambda: gone(processes))


def test_keys_are_those_of_the_server_from_the_moment_that_they_are_new(tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text("disable_token_authorization: false\n")
    key_file = Path("key_file.json")

    def key(kind: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {json.loads(key_file.read_text())[kind]['key']}"}

    with (
        contextlib.chdir(tmp_path),
        server(DEMO_MODELS / "echo", options=(*TWO, "--config", str(tmp_path / "server.yaml"))) as running,
    ):
        assert running.predict("echo", b"x").status == 400
        assert running.predict("echo", b"x" * 7_000_000).json == running.predict("none", b"x").json
        for _ in range(5):
            old = key("inference")
            assert running.predict("echo", b"x" * 1_000_000, old).status == 200
            assert running.predict("echo", b"x" * 7_000_000, old).status == 413
            assert call(f"{running.management}/token?type=inference", headers=key("API")).status == 200
            assert [running.predict("echo", b"x", old).status for _ in range(2)] == [400, 400]
