"""A stream on its way to a frontend process, and there: both ends of it, with nothing between them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest

from minserve.dispatch.request import Stream
from minserve.errors import WorkerFailed
from minserve.frontends.channel import Channel
from minserve.frontends.messages import Piece, Refused, Taken
from minserve.frontends.relay import AHEAD, Relay
from minserve.frontends.uplink import RelayedStream, Uplink
from minserve.wire.frames import Kind
from minserve.wire.messages import Buffer, Message
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio

PIECE = b"x" * 10_000


class Wire:
    """A channel that only remembers."""

    def __init__(self) -> None:
        self.sent: list[tuple[Kind, Message | None]] = []
        self.bytes = 0
        self.channel = self  # it passes for an uplink, too

    def send(self, kind: Kind, number: int = 0, message: Message | None = None) -> None:
        self.sent.append((kind, message))

    def send_with_body(self, kind: Kind, number: int, message: Message, bodies: Sequence[Buffer]) -> None:
        assert cast("Piece", message).lengths == tuple(map(len, bodies))
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
        assert await stream.next() == PIECE
    taken = [message.count for kind, message in wire.sent if isinstance(message, Taken)]
    assert 1_000_000 - AHEAD < sum(taken) <= 1_000_000
    assert len(taken) <= 1_000_000 // (AHEAD // 2)
    stream.mute()
    stream.mute()
    assert [kind for kind, _ in wire.sent].count(Kind.LEAVE) == 1
