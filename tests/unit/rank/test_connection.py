from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Sequence
from typing import cast

import pytest

from minserve.errors import WireError
from minserve.rank.connection import MAX_PIECES, REST_MS, Connection, Disconnected
from minserve.rank.memory import Replies
from minserve.wire.frames import FROM_RANK, SMALL_BYTES, Frame, FrameReader, Kind, encode
from minserve.wire.messages import Answer, Answers, Buffer, Hello, Progress, unpack
from tests.fakes import feed
from tests.unit.rank.rig import Running, launch

ALWAYS_READABLE = os.open(os.devnull, os.O_RDONLY)


class FakeSocket:
    """Gives `incoming` in pieces of at most `step` bytes, and takes as little of a `sendmsg`."""

    def __init__(self, incoming: bytes = b"", step: int = 2**30) -> None:
        self.incoming = incoming
        self.step = step
        self.sent = bytearray()
        self.calls: list[int] = []  # how many pieces each sendmsg was given

    def fileno(self) -> int:
        return ALWAYS_READABLE

    def recv_into(self, buffer: memoryview) -> int:
        count = min(len(buffer), self.step, len(self.incoming))
        buffer[:count] = self.incoming[:count]
        self.incoming = self.incoming[count:]
        return count

    def sendmsg(self, pieces: Sequence[Buffer]) -> int:
        self.calls.append(len(pieces))
        data = b"".join(pieces)[: self.step]
        self.sent += data
        return len(data)

    def sendall(self, data: Buffer) -> None:
        self.sent += data


def over(fake: FakeSocket) -> Connection:
    return Connection(cast("socket.socket", fake))


def sent(fake: FakeSocket) -> list[Frame]:
    return feed(FrameReader(2**30, FROM_RANK), bytes(fake.sent))


def test_a_held_frame_goes_just_in_front_of_the_next_one_in_the_same_call() -> None:
    fake = FakeSocket()
    connection = over(fake)
    connection.hold(Kind.METRICS, Progress("held"), 3)
    assert fake.calls == []
    connection.send_with_body(Kind.REPLY, Answers((Answer(0, 2),)), [b"ok"], 3)
    connection.send(Kind.DONE, Answers(()), 4)
    assert [(frame.kind, frame.seq) for frame in sent(fake)] == [(Kind.METRICS, 3), (Kind.REPLY, 3), (Kind.DONE, 4)]
    assert len(fake.calls) == 2


def receive_all(connection: Connection) -> list[tuple[Kind, int, bytes]]:
    result: list[tuple[Kind, int, bytes]] = []
    while True:
        try:
            frame = connection.receive()
        except Disconnected:
            return result
        result.append((frame.kind, frame.seq, bytes(frame.body)))


def test_a_rank_that_spins_takes_what_comes_while_it_looks_and_what_comes_later() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours)
        polls: list[int | None] = []
        real = connection._poll

        class Poll:
            def poll(self, timeout: int | None = None) -> list[tuple[int, int]]:
                polls.append(timeout)
                if len(polls) == 3 or timeout is None:
                    theirs.sendall(encode(Kind.BATCH, len(polls)))
                return real.poll(timeout)

        connection._poll = cast("select.poll", Poll())
        connection.spin = 3600.0
        assert connection.receive().seq == 3
        assert polls == [0, 0, 0]
        connection.spin = 1e-9  # over with the first look
        polls.clear()
        assert connection.receive().seq == len(polls)
        assert polls[-1] is None


def test_a_rank_that_sends_next_to_nothing_waits_in_its_recv() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours)
        connection._poll = cast("select.poll", None)
        connection.quiet = True
        came = Running(connection.receive)
        theirs.sendall(encode(Kind.BATCH, 7))
        assert came.result().seq == 7


def test_an_idle_rank_0_wakes_to_give_memory_back_until_there_is_none() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours)
        waits: list[int | None] = []

        class Poll:
            def poll(self, timeout: int | None = None) -> list[tuple[int, int]]:
                waits.append(timeout)
                if timeout is None:
                    theirs.sendall(encode(Kind.BATCH, 1))
                return [] if timeout is not None else [(0, 0)]

        class Touched:
            left = 3
            touched = property(lambda self: self.left > 0)

            def rest(self, now: float) -> None:
                self.left -= 1

        connection._poll = cast("select.poll", Poll())
        connection.replies = cast("Replies", Touched())
        assert connection.receive().seq == 1
        assert waits == [REST_MS, REST_MS, REST_MS, None]


@pytest.mark.parametrize("step", [1, 7, 24, 2**30])
def test_frames_come_out_one_by_one_however_the_bytes_come(step: int) -> None:
    stream = encode(Kind.BATCH, 1, b"m", b"body") + encode(Kind.CONTINUE, 1) + encode(Kind.BATCH, 2)
    assert receive_all(over(FakeSocket(stream, step))) == [
        (Kind.BATCH, 1, b"body"),
        (Kind.CONTINUE, 1, b""),
        (Kind.BATCH, 2, b""),
    ]


@pytest.mark.parametrize("cut", [0, 5, 24, 26])
def test_an_end_is_a_disconnect_also_inside_a_frame(cut: int) -> None:
    stream = encode(Kind.BATCH, 1, b"m", b"body")[:cut]
    with pytest.raises(Disconnected):
        over(FakeSocket(stream)).receive()


def test_a_reset_is_a_disconnect_too() -> None:
    class Reset(FakeSocket):
        def recv_into(self, buffer: memoryview) -> int:
            raise ConnectionResetError

    with pytest.raises(Disconnected):
        over(Reset(b"")).receive()


@pytest.mark.parametrize("error", [BrokenPipeError, ConnectionResetError])
def test_a_server_that_is_gone_when_a_rank_speaks_is_a_disconnect_too(error: type[Exception]) -> None:
    class Broken(FakeSocket):
        def sendmsg(self, pieces: Sequence[Buffer]) -> int:
            raise error

    connection = over(Broken())
    with pytest.raises(Disconnected):
        connection.send(Kind.PROGRESS, Progress("weights"))
    assert connection.lost
    with pytest.raises(Disconnected):
        connection.send_with_body(Kind.REPLY, Answers(()), [b"x"], 1)


def test_what_only_a_rank_may_say_is_refused_from_a_server_but_not_what_came_before_it() -> None:
    connection = over(FakeSocket(encode(Kind.SHUTDOWN) + encode(Kind.REPLY, 1)))
    with pytest.raises(WireError, match="frame kind 5 is not allowed"):
        connection.receive()
    assert connection.receive().kind is Kind.SHUTDOWN


def test_hello_says_who_this_rank_is() -> None:
    fake = FakeSocket()
    over(fake).hello(launch(rank=1, world_size=4))
    (frame,) = sent(fake)
    assert unpack(Hello, frame.meta) == Hello(1, 1, 4, os.getpid(), "w1", "secret")


def test_a_message_goes_out_as_one_frame() -> None:
    fake = FakeSocket()
    over(fake).send(Kind.PROGRESS, Progress("weights", 1, 2), 5)
    (frame,) = sent(fake)
    assert (frame.kind, frame.seq) == (Kind.PROGRESS, 5)
    assert unpack(Progress, frame.meta) == Progress("weights", 1, 2)


@pytest.fixture(params=[SMALL_BYTES, 0], ids=["joined", "in-pieces"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Up to how many bytes a frame is joined."""
    monkeypatch.setattr("minserve.rank.connection.SMALL_BYTES", request.param)
    return int(request.param)


BODIES: list[Buffer] = [b"abc", bytearray(b"d"), memoryview(b"efgh"), b"", b"ij"]


def test_a_socket_that_takes_only_some_bytes_gets_the_rest_once(small: int) -> None:
    whole = FakeSocket()
    over(whole).send_with_body(Kind.REPLY, Answers(()), BODIES, 3)
    assert whole.calls == [1 if small else 5]
    for step in range(len(whole.sent) + 1):
        slow = FakeSocket(step=step)
        over(slow).send_with_body(Kind.REPLY, Answers(()), BODIES, 3)
        assert slow.sent == whole.sent, step
    (frame,) = sent(whole)
    assert (frame.seq, bytes(frame.body)) == (3, b"abcdefghij")


@pytest.mark.parametrize("count", [MAX_PIECES - 1, MAX_PIECES, MAX_PIECES + 1, 3 * MAX_PIECES])
@pytest.mark.usefixtures("small")
def test_many_bodies_go_out_in_calls_that_the_kernel_takes(count: int) -> None:
    fake = FakeSocket()
    bodies: list[Buffer] = [bytes([index % 251]) for index in range(count)]
    over(fake).send_with_body(Kind.REPLY, Answers(tuple(Answer(index, 1) for index in range(count))), bodies, 1)
    assert max(fake.calls) <= MAX_PIECES
    (frame,) = sent(fake)
    assert frame.body == b"".join(bodies)


def test_both_directions_over_a_real_socket_with_more_than_its_buffer_holds() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours)
        bodies: list[Buffer] = [os.urandom(700_001), b"x", os.urandom(2**20)]
        sender = threading.Thread(target=connection.send_with_body, args=(Kind.REPLY, Answers(()), bodies, 1))
        sender.start()
        reader, frames = FrameReader(2**30, FROM_RANK), list[Frame]()
        while not frames:
            frames += reader.received(theirs.recv_into(reader.buffer()))
        sender.join()
        assert frames[0].body == b"".join(bodies)

        theirs.sendall(encode(Kind.BATCH, 1, b"", b"hello"))
        assert connection.receive().body == b"hello"
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(Disconnected):
            connection.receive()


def test_frames_of_two_threads_do_not_mix() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours)
        body = [bytes(50_000)] * 3

        def send(seq: int) -> None:
            for _ in range(20):
                connection.send_with_body(Kind.CHUNK, Answers(()), list[Buffer](body), seq)

        senders = [threading.Thread(target=send, args=(seq,)) for seq in (1, 2, 3)]
        for sender in senders:
            sender.start()
        reader, frames = FrameReader(2**30, FROM_RANK), list[Frame]()
        while len(frames) < 60:
            frames += reader.received(theirs.recv_into(reader.buffer()))
        for sender in senders:
            sender.join()
        assert sorted(frame.seq for frame in frames) == [1] * 20 + [2] * 20 + [3] * 20
