"""A frontend process as the server sees it, without the process."""

import asyncio
from typing import Any, cast

import pytest

from minserve.frontends.member import Member
from minserve.wire.frames import Frame, Kind

pytestmark = pytest.mark.asyncio


class Wire:
    """Both the channel and the door."""

    def __init__(self) -> None:
        self.sent: list[Kind] = []

    def send(self, kind: Kind, number: int) -> None:
        self.sent.append(kind)

    def received(self, frame: Frame) -> None:
        pass


async def test_what_is_gathered_is_not_what_a_pulse_has_asked_for_earlier() -> None:
    wire = Wire()
    member = Member(*[cast("Any", wire)] * 6)
    member.channel = member._door = cast("Any", wire)
    member.opened.set()
    member._ask()
    recorded = Frame(Kind.RECORDED, 0, 1, bytearray(), bytearray())
    waits = [asyncio.create_task(member.gather()) for _ in range(2)]
    await asyncio.sleep(0)
    assert wire.sent == [Kind.GATHER]
    member._received(recorded)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not any(wait.done() for wait in waits)
    assert wire.sent == [Kind.GATHER] * 2
    member._received(recorded)
    await asyncio.gather(*waits)
    assert wire.sent == [Kind.GATHER] * 2
