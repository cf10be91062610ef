"""When a client of the Python generator has its answer, and whether it is a good one."""

from __future__ import annotations

import asyncio

import pytest

from tests.benchmarks.clients import Connection

SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
REFUSED = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def abort(self) -> None: ...


def connect() -> tuple[Connection, Transport, list[bool]]:
    answers: list[bool] = []
    connection = Connection(b"request", lambda _, good: answers.append(good))
    transport = Transport()
    connection.connection_made(transport)
    return connection, transport, answers


@pytest.mark.parametrize(("answer", "good"), [(SIZED, True), (CHUNKED, True), (REFUSED, False)])
def test_an_answer_counts_once_it_is_whole(answer: bytes, good: bool) -> None:
    connection, transport, answers = connect()
    connection.send(due=1.0)
    for index in range(len(answer)):
        assert answers == []
        connection.data_received(answer[index : index + 1])
    assert answers == [good]
    connection.send(due=2.0)
    connection.data_received(answer)
    assert answers == [good, good]
    assert transport.written == [b"request", b"request"]


def test_a_lost_connection_is_a_failure_unless_it_was_ended() -> None:
    connection, _, answers = connect()
    connection.connection_lost(None)
    assert answers == [False]
    connection, _, answers = connect()
    connection.stop()
    connection.connection_lost(None)
    assert answers == []
