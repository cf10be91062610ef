"""Clients that send no HTTP, that are slow, or that do not read, against one real server."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.integration.invalid_http import BadRequest, corpus, send
from tests.integration.servers import DEMO_MODELS, MODELS, RunningServer, call, server, until

MAX_CONNECTIONS = 400
OPTIONS = f"""
header_timeout: 1
body_timeout: 2
keepalive_timeout: 1
max_connections: {MAX_CONNECTIONS}
"""
DEADLINE_S = 20.0
MORE_RSS = 64 * 1024 * 1024  # what an allocator may keep of a few bodies at the limit
CORPUS = corpus()

Address = tuple[str, int]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with little patience. After all that is done to it here it must be as large as before."""
    config: Path = tmp_path_factory.mktemp("http") / "server.yaml"
    config.write_text(OPTIONS)
    with server(DEMO_MODELS / "echo", MODELS / "floods", options=("--config", str(config))) as running:
        process = psutil.Process(running.process.pid)
        for _ in range(5):
            assert running.predict("echo", b"x" * 6_000_000).status == 200
        assert running.predict("floods", b"10").body == b"x" * 655360
        fds, own = descriptors(process), own_memory(process)
        yield running
        until(lambda: descriptors(process) <= fds, DEADLINE_S, "as few open descriptors as before")
        until(lambda: own_memory(process) < own + MORE_RSS, DEADLINE_S, "as little memory as before")
        assert "Traceback" not in running.log


@pytest.fixture
def address(running: RunningServer) -> Address:
    url = urlsplit(running.inference)
    assert url.hostname is not None
    assert url.port is not None
    return url.hostname, url.port


def own_memory(process: psutil.Process) -> int:
    """Without what it shares with the ranks, which keep it for a while (test_large_bodies)."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def descriptors(process: psutil.Process) -> int:
    return process.num_fds()


def test_the_corpus_is_there() -> None:
    assert len(CORPUS) >= 100


@pytest.mark.parametrize("bad", CORPUS, ids=[bad.name for bad in CORPUS])
def test_a_bad_request_gets_its_answer_and_the_server_goes_on(
    running: RunningServer, address: Address, bad: BadRequest
) -> None:
    answer, ended = send(address, bad)
    statuses = [int(status) for status in re.findall(rb"^HTTP/1\.[01] (\d+)", answer, re.MULTILINE)]
    assert statuses == ([] if bad.status is None else [bad.status]), answer
    assert ended, answer
    if bad.status is not None and bad.status >= 400:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert json.loads(body)["code"] == bad.status
        assert b"\r\nx-request-id: " in head.lower()
        assert not bad.closes or b"\r\nConnection: close" in head
    assert running.predict("echo", b"still here").body == b"still here"


def connect(address: Address, stack: ExitStack, receive_buffer: int = 0) -> socket.socket:
    client = stack.enter_context(socket.socket())
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(DEADLINE_S)
    client.connect(address)
    return client


def read_all(client: socket.socket) -> bytes:
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while received := client.recv(65536):
            got += received
    return got


def trickle(clients: list[socket.socket], data: bytes) -> None:
    """Sends a byte at a time to whoever still listens, until the server has ended all the connections."""
    listening = set(clients)
    deadline = time.monotonic() + DEADLINE_S
    for byte in iter(lambda: data, None):
        for client in list(listening):
            try:
                client.send(byte)
            except ConnectionError:
                listening.discard(client)
        if not listening:
            return
        assert time.monotonic() < deadline, f"{len(listening)} clients may still go on"
        time.sleep(0.1)  # the attack: never silent, never done


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /ping HTTP/1.1\r\nHost: x\r\nX: ",
        b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
        b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;",
    ],
    ids=["head", "body", "chunk extension"],
)
def test_slow_clients_get_a_408_and_disturb_nobody(running: RunningServer, address: Address, begin: bytes) -> None:
    with ExitStack() as stack:
        clients = [connect(address, stack) for _ in range(20)]
        for client in clients:
            client.sendall(begin)
        began = time.monotonic()
        assert running.predict("echo", b"in time").body == b"in time"
        assert time.monotonic() - began < 5.0
        trickle(clients, b"a")
        for client in clients:
            assert read_all(client).startswith((b"HTTP/1.1 408 ", b"HTTP/1.0 408 "))


def test_300_idle_connections_are_closed_and_disturb_nobody(running: RunningServer, address: Address) -> None:
    process = psutil.Process(running.process.pid)
    before = descriptors(process)
    with ExitStack() as stack:
        clients = [connect(address, stack) for _ in range(300)]
        for client in clients[::2]:  # these have had an answer, the others never say a word
            client.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert running.predict("echo", b"among them").body == b"among them"
        for number, client in enumerate(clients):
            answer = read_all(client)
            assert answer.startswith(b"HTTP/1.1 200 ") if number % 2 == 0 else answer == b""
        until(lambda: descriptors(process) <= before, DEADLINE_S, "the server's ends are closed")


def test_one_connection_too_many_is_a_503_and_the_other_port_is_free(running: RunningServer, address: Address) -> None:
    head = b""
    deadline = time.monotonic() + DEADLINE_S
    # Once more where the first ones were closed for their silence before the last came.
    while not head.startswith(b"HTTP/1.1 503 "):
        assert time.monotonic() < deadline
        with ExitStack() as stack:
            clients = [connect(address, stack) for _ in range(MAX_CONNECTIONS + 20)]
            clients[-1].sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
            head = read_all(clients[-1])
            assert call(f"{running.management}/ping").status == 200
    assert b"\r\nRetry-After: 1\r\n" in head
    until(lambda: answers(running), DEADLINE_S, "room for a connection again")


def answers(running: RunningServer) -> bool:
    with contextlib.suppress(ConnectionError):
        return running.predict("echo", b"x").status == 200
    return False


def test_a_client_that_reads_nothing_of_its_stream_counts_as_gone(running: RunningServer, address: Address) -> None:
    with ExitStack() as stack:
        client = connect(address, stack, receive_buffer=4096)
        head = b"POST /predictions/floods HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\n"
        client.sendall(head + b"1000000")
        # The only worker is busy with it, until the server gives up on the client and cancels the batch.
        assert running.predict("floods", b"3", timeout=DEADLINE_S).body == b"x" * 3 * 65536
        assert not read_all(client).endswith(b"0\r\n\r\n")
    assert running.states("floods") == ["READY"]
    assert running.restarts("floods") == 0


def test_a_slow_reader_gets_its_whole_stream(running: RunningServer, address: Address) -> None:
    with ExitStack() as stack:
        client = connect(address, stack, receive_buffer=4096)
        head = b"POST /predictions/floods HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3\r\n\r\n"
        client.sendall(head + b"100")
        got = b""
        while received := client.recv(1_000_000):
            got += received
        assert got.endswith(b"\r\n0\r\n\r\n")
        assert got.count(b"\r\n10000\r\n") == 100


def test_clients_that_take_nothing_of_their_answers_are_dropped(running: RunningServer, address: Address) -> None:
    process = psutil.Process(running.process.pid)
    before = descriptors(process)
    with ExitStack() as stack:
        for _ in range(10):
            client = connect(address, stack, receive_buffer=4096)
            body = b"x" * 6_000_000
            head = b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            client.sendall(head + body)
        assert running.predict("echo", b"still here").body == b"still here"
        until(lambda: descriptors(process) <= before, DEADLINE_S, "the server's ends are closed")
