"""Large bodies through shared memory: every rank sees every byte of its own request and of no other, and nothing leaks."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from minserve.testing import until
from tests.integration.servers import MODELS, Answer, RunningServer, call, server

LIMIT = 32 * 2**20
THRESHOLD = 64 * 1024
BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    config = tmp_path_factory.mktemp("c") / "config.yaml"
    config.write_text(f"max_request_size: {LIMIT}\nmax_response_size: {LIMIT}\nmax_in_flight_bytes: {20 * LIMIT}\n")
    with server(MODELS / "large", options=("--config", str(config))) as one:
        yield one


@pytest.fixture(autouse=True)
def nothing_is_left(running: RunningServer) -> Iterator[None]:
    yield
    until(lambda: in_use(running) == {"requests": 0, "answers": 0}, 10.0, "the end of what is in shared memory")


def in_use(running: RunningServer) -> dict[str, int]:
    """Bytes of shared memory, by what they hold."""
    text = call(f"{running.metrics}/metrics?name[]=minserve_shared_memory_bytes").text
    return {kind: int(float(value)) for kind, value in re.findall(r'holds="(\w+)".*} (\S+)', text)}


def ask(running: RunningServer, body: bytes, do: str = "look", kind: str = BINARY["Content-Type"]) -> Answer:
    answer = call(f"{running.inference}/predictions/large", body, {"Content-Type": kind, "do": do})
    assert answer.status == 200, answer.text
    return answer


def some_bytes(length: int, seed: int = 0) -> bytes:
    return random.Random(seed or length).randbytes(length)


def digest(body: bytes) -> str:
    return hashlib.blake2b(body).hexdigest()


def seen(body: bytes, name: str = "body") -> list[dict[str, str]]:
    """What both ranks see of it."""
    return [{name: digest(body)}] * 2


@pytest.mark.parametrize("length", [1, THRESHOLD - 1, THRESHOLD, THRESHOLD + 1, 2**20 + 3, 2**24])
def test_every_rank_sees_every_byte(running: RunningServer, length: int) -> None:
    body = some_bytes(length)
    assert ask(running, body).json == seen(body)


@pytest.mark.parametrize("length", [THRESHOLD - 1, 2**22])
def test_a_view_becomes_a_tensor_without_a_copy(running: RunningServer, length: int) -> None:
    body = some_bytes(length)
    expected = {"digest": digest(body), "shared": length >= THRESHOLD, "readonly": True}
    assert ask(running, body, "tensor").json == expected


def test_a_large_field_of_a_form_is_shared_too(running: RunningServer) -> None:
    image, note = some_bytes(2**20), some_bytes(10)
    parts = [("image", image), ("note", note)]
    head = b'--xyz\r\nContent-Disposition: form-data; name="%b"\r\n\r\n'
    form = b"".join(head % name.encode() + body + b"\r\n" for name, body in parts) + b"--xyz--\r\n"
    answer = ask(running, form, kind="multipart/form-data; boundary=xyz")
    assert answer.json == [{name: digest(body) for name, body in parts}] * 2


@pytest.mark.parametrize("length", [THRESHOLD - 1, THRESHOLD, 2**24])
def test_a_large_answer_comes_whole(running: RunningServer, length: int) -> None:
    body = some_bytes(length)
    assert ask(running, body, "echo").body == body


def test_many_at_once_are_not_mixed_up_and_more_than_the_memory_holds_goes_all_the_same(running: RunningServer) -> None:
    """Up to 32 requests of up to 6 MiB each against 64 MiB: some of them find the arena full."""

    def one(number: int) -> None:
        body = some_bytes(random.Random(number).randrange(THRESHOLD // 2, 6 * 2**20), number)
        if number % 2:
            assert ask(running, body, "echo").body == body
        else:
            assert ask(running, body).json == seen(body)

    with ThreadPoolExecutor(32) as clients:
        list(clients.map(one, range(100)))


def test_what_a_handler_keeps_stays_as_it_is_whatever_comes_after(running: RunningServer) -> None:
    bodies = [some_bytes(2**20, seed) for seed in (1, 2, 3)]
    for body in bodies:
        ask(running, body, "keep")
    assert in_use(running)["requests"] == 3 * 2**20
    kept = [digest(body[1:]) for body in bodies]
    for length in (2**24, 2**20, 2**24):  # they are received around what is kept
        body = some_bytes(length)
        assert ask(running, body).json == seen(body)
        assert ask(running, b"", "kept_ones").json == kept
    ask(running, b"", "let_go")


def test_a_client_that_leaves_in_the_middle_of_its_body_holds_nothing(running: RunningServer) -> None:
    host, port = running.inference.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(
            b"POST /predictions/large HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n" + b"x" * 200_000
        )
        until(lambda: in_use(running)["requests"] > 0, 10.0, "its body in shared memory")


def test_slow_clients_hold_their_answers_and_give_them_back_when_they_leave(running: RunningServer) -> None:
    host, port = running.inference.removeprefix("http://").split(":")
    length = 2**24
    head = b"POST /predictions/large HTTP/1.1\r\nHost: x\r\ndo: echo\r\nContent-Length: %d\r\n\r\n" % length
    clients = [socket.create_connection((host, int(port))) for _ in range(4)]
    for number, client in enumerate(clients):
        client.sendall(head + bytes([number]) * length)
    until(lambda: in_use(running)["answers"] >= 3 * length, 20.0, "answers that wait for their clients")
    other = some_bytes(2**20)
    assert ask(running, other, "echo").body == other
    for number, client in enumerate(clients):
        with client:
            if number % 2:  # the others leave
                got = b""
                while not got.endswith(bytes([number]) * 8) or len(got) < length:
                    got += client.recv(2**20)
                assert got[-length:] == bytes([number]) * length


def test_ranks_that_are_killed_with_bodies_leave_nothing_and_the_next_serves_on(running: RunningServer) -> None:
    bodies = [some_bytes(2**20, seed) for seed in range(1, 7)]
    with ThreadPoolExecutor(8) as clients:
        lost = clients.submit(call, f"{running.inference}/predictions/large", bodies[0], {**BINARY, "do": "wait"})
        until(lambda: running.states("large") == ["BUSY"], 10.0, "the batch that hangs")
        waiting = [clients.submit(ask, running, body) for body in bodies[1:]]
        until(lambda: in_use(running)["requests"] == 6 * 2**20, 10.0, "all bodies")
        os.kill(running.pids("large")[1], signal.SIGKILL)
        assert lost.result().status == 503
        assert [one.result().json for one in waiting] == [seen(body) for body in bodies[1:]]
