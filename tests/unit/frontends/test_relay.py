"""A stream on its way to a frontend process, and there: both ends of it, with nothing between them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import msgspec
import pytest

from minserve.dispatch.request import Stream
from minserve.errors import WireError, WorkerFailed
from minserve.frontends.channel import Channel
from minserve.frontends.messages import Piece, Refused, Taken
from minserve.frontends.relay import AHEAD, Relay
from minserve.frontends.uplink import RelayedStream, Uplink
from minserve.wire.frames import TO_FRONTEND, Frame, FrameReader, Kind
from minserve.wire.messages import Buffer, Message, pack_with_body
from tests.fakes import feed
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio

PIECE = b"x" * 10_000


class Wire:
    """A channel that only remembers."""

    def __init__(self) -> None:
        self.sent: list[tuple[Kind, Message | None]] = []
        self.frames: list[Frame] = []  # those with a body
        self.bytes = 0
        self.channel = self  # it passes for an uplink, too

    def send(self, kind: Kind, number: int = 0, message: Message | None = None) -> None:
        self.sent.append((kind, message))

    def send_with_body(self, kind: Kind, number: int, message: Message, bodies: Sequence[Buffer]) -> None:
        assert cast("Piece", message).lengths == tuple(map(len, bodies))
        self.frames += feed(FrameReader(2**31, TO_FRONTEND), b"".join(pack_with_body(kind, message, bodies, number)))
        self.bytes += sum(map(len, bodies))

    def leave_stream(self, number: int) -> None:
        self.sent.append((Kind.LEAVE, None))


def relayed(wire: Wire, pieces: int) -> tuple[Relay, Stream]:
    stream = Stream(2**30, lambda: None)
    for _ in range(pieces):
        stream.put(PIECE)
    relays: dict[int, Relay] = {}
    relays[1] = Relay(1, stream, cast("Channel", wire), relays)
    return relays[1], stream


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


async def test_no_more_is_under_way_than_the_client_takes() -> None:
    wire = Wire()
    relay, stream = relayed(wire, 100)
    await settle()
    assert AHEAD <= wire.bytes < AHEAD + len(PIECE)
    relay.taken(len(PIECE))
    await settle()
    assert AHEAD + len(PIECE) <= wire.bytes < AHEAD + 2 * len(PIECE)
    stream.end()
    while Kind.END not in [kind for kind, _ in wire.sent]:
        relay.taken(AHEAD)
        await settle()
    assert wire.bytes == 100 * len(PIECE)
    assert stream.muted, "nobody wants more of it"


async def test_what_went_with_the_head_is_under_way_too() -> None:
    wire = Wire()
    stream = Stream(2**30, lambda: None)
    relays: dict[int, Relay] = {}
    relays[1] = Relay(1, stream, cast("Channel", wire), relays, AHEAD)
    stream.put(PIECE)
    await settle()
    assert wire.bytes == 0
    relays[1].taken(1)
    await settle()
    assert wire.bytes == len(PIECE)
    relays[1].cancel()


async def test_what_has_come_goes_with_one_frame_and_comes_out_as_it_went_in() -> None:
    wire = Wire()
    relay, stream = relayed(wire, 0)
    for chunk in (b"", b"one", b"two"):
        stream.put(chunk)
    await until(lambda: wire.frames)
    (frame,) = wire.frames
    uplink = Uplink(cast("Channel", wire))
    there = uplink._streams[1] = RelayedStream(1, uplink, 30.0)
    uplink.received(frame)
    assert await there.take(100) == [b"", b"one", b"two"]
    relay.cancel()


async def test_a_large_chunk_is_not_copied_on_its_way_to_the_client() -> None:
    uplink = Uplink(cast("Channel", Wire()))
    stream = uplink._streams[1] = RelayedStream(1, uplink, 30.0)
    frame = Frame(Kind.PIECE, 0, 1, bytearray(msgspec.msgpack.encode(Piece((len(PIECE),)))), bytearray(PIECE))
    uplink.received(frame)
    (chunk,) = await stream.take(100)
    assert chunk is frame.body


@pytest.mark.parametrize("lengths", [(1,), (3,), (1, 2), (-1, 3), (), ("2",)])
async def test_lengths_that_are_not_those_of_the_chunks_break_the_channel(lengths: tuple[int, ...]) -> None:
    uplink = Uplink(cast("Channel", Wire()))
    stream = uplink._streams[1] = RelayedStream(1, uplink, 30.0)
    frame = Frame(Kind.PIECE, 0, 1, bytearray(msgspec.msgpack.encode(Piece(lengths))), bytearray(b"xy"))
    with pytest.raises(WireError):
        uplink.received(frame)
    stream.end()
    assert await stream.take(100) == [], "none of it goes to the client"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (WorkerFailed("rank 1 died"), 503, "rank 1 died"),
        (KeyError("ours"), 500, "Internal error; the log has its traceback"),
    ],
)
async def test_a_stream_that_breaks_off_says_why(error: Exception, status: int, text: str) -> None:
    wire = Wire()
    _, stream = relayed(wire, 1)
    stream.end(error)
    await until(lambda: wire.sent)
    ((kind, refused),) = wire.sent
    assert isinstance(refused, Refused)
    assert (kind, refused.status, refused.text) == (Kind.REFUSED, status, text)
    assert wire.bytes == len(PIECE)


async def test_a_client_that_leaves_mutes_it_at_once() -> None:
    relay, stream = relayed(Wire(), 100)
    relay.cancel()
    assert stream.muted


async def test_the_server_hears_how_much_a_client_takes_but_not_of_each_piece() -> None:
    wire = Wire()
    stream = RelayedStream(1, cast("Uplink", wire), 30.0)
    for _ in range(100):
        stream.put(PIECE)
        assert await stream.take(1) == [PIECE]
    taken = [message.count for kind, message in wire.sent if isinstance(message, Taken)]
    assert 1_000_000 - AHEAD < sum(taken) <= 1_000_000
    assert len(taken) <= 1_000_000 // (AHEAD // 2)
    stream.mute()
    stream.mute()
    assert [kind for kind, _ in wire.sent].count(Kind.LEAVE) == 1
