from collections.abc import Iterable

import pytest

from minserve.errors import WireError
from minserve.wire.frames import Frame, Kind, encode
from minserve.wire.messages import Hello
from minserve.worker.link import LATER_PIECES, Link

HELLO = Hello(1, 1, 2, 4711, "m-0", "secret")


class MockTransport:
    """Remembers what was written and how it ended."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.writes: list[list[bytes]] = []  # the same, call by call
        self.taken = 0  # bytes that the socket has taken
        self.aborted = False
        self.limits: tuple[int, int] | None = None

    def writelines(self, pieces: Iterable[bytes]) -> None:
        self.writes.append([*pieces])
        self.written += self.writes[-1]

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self.written)) - self.taken

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        self.limits = (high, low)

    def abort(self) -> None:
        self.aborted = True


class Setup:
    def __init__(self) -> None:
        self.frames: list[tuple[Kind, int, bytes]] = []
        self.taken: list[int] = []  # how many frames there were each time
        self.room = 0
        self.lost: list[str | None] = []
        self.link = Link(
            HELLO, self._on_frame, self._on_taken, self._on_room, lambda _, reason: self.lost.append(reason)
        )
        self.transport = MockTransport()
        self.link.connection_made(self.transport)  # type: ignore[arg-type]

    def _on_frame(self, link: Link, frame: Frame) -> None:
        assert link is self.link
        if frame.seq == 99:
            raise WireError("a wrong seq")
        if frame.seq == 98:
            link.close()
        self.frames.append((frame.kind, frame.seq, bytes(frame.body)))

    def _on_taken(self) -> None:
        self.taken.append(len(self.frames))

    def _on_room(self) -> None:
        self.room += 1

    def feed(self, data: bytes, step: int = 2**20) -> None:
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            buffer = self.link.get_buffer(-1)
            buffer[: len(piece)] = piece
            self.link.buffer_updated(len(piece))


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_frames_come_out_however_the_bytes_come_in(step: int) -> None:
    setup = Setup()
    setup.feed(encode(Kind.REPLY, 1, b"m", b"body") + encode(Kind.DONE, 2) + encode(Kind.CHUNK, 3, b"", b"x"), step)
    assert setup.frames == [(Kind.REPLY, 1, b"body"), (Kind.DONE, 2, b""), (Kind.CHUNK, 3, b"x")]
    assert setup.lost == []


def test_the_end_of_a_read_is_told_behind_all_its_frames() -> None:
    setup = Setup()
    setup.feed(encode(Kind.CHUNK, 1) + encode(Kind.CHUNK, 1) + encode(Kind.CHUNK, 1)[:5])
    setup.feed(encode(Kind.CHUNK, 1)[5:])
    assert setup.taken == [2, 3]
    with_error = Setup()
    with_error.feed(encode(Kind.CHUNK, 1) + encode(Kind.CHUNK, 99))
    assert (with_error.taken, len(with_error.lost)) == ([], 1)


def test_a_frame_is_written_in_pieces_that_are_not_joined() -> None:
    setup = Setup()
    pieces: list[bytes | bytearray] = [b"header", b"body", bytearray(b"another")]
    setup.link.write(pieces)
    assert all(written is piece for written, piece in zip(setup.transport.written, pieces, strict=True))


def test_frames_for_later_go_with_the_next_or_with_a_flush_and_in_order() -> None:
    setup = Setup()
    setup.link.write([b"1"])
    setup.link.write([b"2"], later=True)
    setup.link.write([b"3"], later=True)
    assert setup.transport.writes == [[b"1"]]
    setup.link.write([b"4", b"5"])
    setup.link.flush()
    assert setup.transport.writes == [[b"1"], [b"2", b"3", b"4", b"5"]]
    setup.link.write([b"6"], later=True)
    setup.link.flush()
    assert setup.transport.writes[2:] == [[b"6"]]


def test_no_more_than_a_few_frames_wait() -> None:
    setup = Setup()
    for _ in range(LATER_PIECES + 1):
        setup.link.write([b"x"], later=True)
    assert setup.transport.writes == [[b"x"] * (LATER_PIECES + 1)]


def test_a_link_that_is_closed_drops_what_was_to_go_later() -> None:
    setup = Setup()
    setup.link.write([b"x"], later=True)
    setup.link.close()
    setup.link.flush()
    assert setup.transport.writes == []


def test_there_is_room_while_the_unsent_bytes_are_under_the_mark() -> None:
    setup = Setup()
    assert setup.link.has_room
    assert setup.transport.limits is not None
    high, low = setup.transport.limits
    assert 0 < low < high
    setup.link.pause_writing()
    assert (setup.link.has_room, setup.room) == (False, 1)
    setup.link.resume_writing()
    assert (setup.link.has_room, setup.room) == (True, 2)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "not a minserve frame"),
        (encode(Kind.BATCH, 1), "frame kind 33 is not allowed"),
        (encode(Kind.HELLO), "frame kind 1 is not allowed"),
        (encode(Kind.REPLY, 99), "a wrong seq"),
    ],
)
def test_what_breaks_the_protocol_ends_the_link_with_the_reason(data: bytes, reason: str) -> None:
    setup = Setup()
    setup.feed(encode(Kind.REPLY, 1) + data)
    assert [frame[1] for frame in setup.frames] == [1]
    (told,) = setup.lost
    assert told is not None
    assert told.startswith(reason)
    assert setup.transport.aborted
    setup.link.connection_lost(None)
    assert len(setup.lost) == 1, "told once"


def test_an_end_of_file_is_told_without_a_reason() -> None:
    setup = Setup()
    assert setup.link.eof_received(), "the transport shall stay open, else a rank that lives ends itself"
    assert not setup.transport.aborted
    setup.link.connection_lost(None)
    assert setup.lost == [None]
    assert setup.link.closed


@pytest.mark.parametrize("error", [None, ConnectionResetError()])
def test_a_lost_connection_is_told_once(error: Exception | None) -> None:
    setup = Setup()
    setup.link.connection_lost(error)
    setup.link.connection_lost(error)
    assert setup.lost == [None]


def test_an_end_in_the_middle_of_a_frame_is_told() -> None:
    setup = Setup()
    setup.feed(encode(Kind.REPLY, 1, b"", b"body")[:-1])
    setup.link.eof_received()
    setup.link.connection_lost(None)
    assert setup.lost == ["closed its socket in the middle of a frame"]


def test_a_link_that_we_close_says_nothing_takes_nothing_and_drops_what_is_unsent() -> None:
    setup = Setup()
    setup.link.write([b"unsent"])
    setup.link.close()
    setup.link.close()
    setup.link.write([b"more"])
    setup.link.connection_lost(None)
    assert setup.transport.aborted
    assert setup.transport.written == [b"unsent"]
    assert setup.lost == []


def test_a_link_that_a_frame_closes_hands_out_none_behind_it() -> None:
    setup = Setup()
    setup.feed(encode(Kind.REPLY, 98) + encode(Kind.REPLY, 2))
    assert [frame[1] for frame in setup.frames] == [98]
