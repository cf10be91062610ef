"""The data of handlers, from frames and from shared memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from minserve.errors import WireError
from minserve.rank.bodies import Bodies
from minserve.wire.arena import BLOCK_BYTES, Arena, Marks, new_memory
from minserve.wire.messages import Batch, Part, RequestMeta, Shared, new_batch
from minserve.wire.views import Views
from tests.unit.rank.rig import requests

BLOCKS = 8


class Memory:
    """The server's end of an arena, and this rank's views of it."""

    def __init__(self) -> None:
        self.arena = Arena(new_memory("test", BLOCKS * BLOCK_BYTES))
        marks, reader = new_memory("test", Marks.size(1, BLOCKS)), self.arena.open_for_readers()
        self._marks = Marks(marks, 1)
        self.views = Views(reader, self._marks.rows[0])
        os.close(marks)
        os.close(reader)

    def batch(
        self, metas: Sequence[RequestMeta], bodies: Sequence[bytes], shared: Sequence[int]
    ) -> tuple[Batch, bytearray]:
        """A batch with these parts in shared memory, and its frame's body."""
        places = []
        for index in shared:
            segment = self.arena.allocate(len(bodies[index]))
            assert segment is not None
            segment.view[:] = bodies[index]
            segment.lend(self._marks)
            segment.release()
            places.append(Shared(index, segment.block, segment.use))
        inline = b"".join(body for index, body in enumerate(bodies) if index not in shared)
        return new_batch(metas, shared=tuple(places)), bytearray(inline)


@pytest.fixture
def memory() -> Memory:
    return Memory()


FORM = RequestMeta("form", (), (Part("image", "image/png", 3), Part("text", "text/plain", 2), Part("raw", "", 4)))
BODIES = [b"png", b"hi", b"four", b"a body"]
METAS = (FORM, *requests(b"a body"))


@pytest.mark.parametrize("shared", [[], [0], [1], [3], [0, 2], [0, 1, 2, 3]])
@pytest.mark.parametrize("views", [False, True])
def test_a_handler_sees_the_same_wherever_a_part_lies(memory: Memory, shared: list[int], views: bool) -> None:
    batch, inline = memory.batch(METAS, BODIES, shared)
    rows = Bodies(memory.views, views=views).decode(batch, inline)
    assert rows == [{"image": b"png", "text": "hi", "raw": b"four"}, {"body": b"a body"}]
    kinds = {type(value) for row in rows for value in row.values()} - {str}
    assert kinds == {memoryview if views else bytearray}
    if not views:
        assert memory.arena.used == 0, "copied, and so given back"


def test_views_are_read_only_and_pin_what_is_shared(memory: Memory) -> None:
    batch, inline = memory.batch(METAS, BODIES, [0, 1])
    rows = Bodies(memory.views, views=True).decode(batch, inline)
    assert all(value.readonly for row in rows for value in row.values() if isinstance(value, memoryview))
    assert memory.arena.used == BLOCK_BYTES, "the text is parsed, the image is looked at"
    del rows
    assert memory.arena.used == 0


def test_what_does_not_parse_is_a_view_too(memory: Memory) -> None:
    batch, inline = memory.batch(requests(b"[1,", content_type="application/json"), [b"[1,"], [0])
    ((value,),) = (row.values() for row in Bodies(memory.views, views=True).decode(batch, inline))
    assert isinstance(value, memoryview)
    assert bytes(value) == b"[1,"
    assert value.readonly


def test_json_stays_a_view_where_nothing_is_to_be_parsed(memory: Memory) -> None:
    batch, inline = memory.batch(requests(b"[1]", content_type="application/json"), [b"[1]"], [0])
    rows = Bodies(memory.views, parse=False, views=True).decode(batch, inline)
    assert rows == [{"body": b"[1]"}]
    assert memory.arena.used


def test_a_rank_that_does_not_run_a_batch_lets_go_of_it(memory: Memory) -> None:
    batch, _ = memory.batch(METAS, BODIES, [0, 3])
    Bodies(memory.views).skip(batch)
    assert memory.arena.used == 0


@pytest.mark.parametrize("place", [Shared(1, 0, 1), Shared(-1, 0, 1), Shared(0, BLOCKS, 1)])
def test_a_place_that_is_none_is_an_error(memory: Memory, place: Shared) -> None:
    with pytest.raises(WireError):
        Bodies(memory.views).decode(new_batch(requests(b"x"), shared=(place,)), bytearray())


def test_shared_memory_that_was_never_given_is_an_error() -> None:
    with pytest.raises(WireError, match="of which there is none"):
        Bodies().decode(new_batch(requests(b"x"), shared=(Shared(0, 0, 1),)), bytearray())
