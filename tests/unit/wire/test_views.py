from __future__ import annotations

import gc
import os
import signal
from dataclasses import dataclass
from typing import Any

import pytest

from minserve.errors import WireError
from minserve.wire.arena import BLOCK_BYTES, Arena, Marks, Segment, new_memory
from minserve.wire.views import Views

BLOCKS = 4
TEXT = b"a body" * 20_000  # over one block


@dataclass
class Shared:
    """An arena with one reader."""

    arena: Arena
    marks: Marks
    views: Views

    def lent(self, body: bytes = TEXT) -> Segment:
        segment = self.arena.allocate(len(body))
        assert segment is not None
        segment.view[:] = body
        segment.lend(self.marks)
        segment.release()
        return segment

    def view(self, segment: Segment) -> memoryview:
        return self.views.view(segment.block, segment.use, segment.length)


@pytest.fixture
def shared() -> Shared:
    arena = Arena(new_memory("test", BLOCKS * BLOCK_BYTES))
    descriptor, reader = new_memory("test", Marks.size(1, BLOCKS)), arena.open_for_readers()
    marks = Marks(descriptor, 1)
    views = Views(reader, Marks(descriptor, 1).rows[0])
    os.close(descriptor)
    os.close(reader)
    return Shared(arena, marks, views)


def test_a_view_shows_the_body_itself_and_cannot_be_written_to(shared: Shared) -> None:
    segment = shared.lent()
    view = shared.view(segment)
    assert view == TEXT
    assert (view.readonly, view.format, view[0]) == (True, "B", TEXT[0])
    segment.view[0] = 0
    assert view[0] == 0, "it is no copy"


def test_the_segment_is_pinned_by_whatever_was_made_from_the_view(shared: Shared) -> None:
    view: memoryview | None = shared.view(shared.lent())
    assert view is not None
    part = view[10:20]
    view = None
    assert shared.arena.used
    assert shared.views.held == len(TEXT)
    assert shared.arena.allocate(3 * BLOCK_BYTES) is None, "nobody gets it meanwhile"
    items = iter(part)
    del part
    assert shared.arena.used, "an iterator is enough"
    del items
    assert shared.arena.used == shared.views.held == 0


def test_a_pinned_view_never_changes_whatever_comes_after_it(shared: Shared) -> None:
    kept = shared.view(shared.lent())
    for number in range(20):
        other = shared.view(shared.lent(bytes([number]) * BLOCK_BYTES))
        assert other[-1] == number
        del other
    assert kept == TEXT


def test_a_copy_is_its_readers_own_and_frees_the_segment_at_once(shared: Shared) -> None:
    segment = shared.lent()
    copy = shared.views.copy(segment.block, segment.use, segment.length)
    assert type(copy) is bytearray
    assert copy == TEXT
    assert shared.arena.used == 0
    shared.lent(b"x" * len(TEXT))
    assert copy == TEXT


def test_what_is_not_wanted_is_free_unseen(shared: Shared) -> None:
    segment = shared.lent()
    shared.views.skip(segment.block, segment.use)
    assert shared.arena.used == 0


@pytest.mark.parametrize(
    ("block", "length"),
    [(-1, 1), (BLOCKS, 1), (0, 0), (0, -1), (0, BLOCKS * BLOCK_BYTES + 1), (1, BLOCKS * BLOCK_BYTES), (2**60, 1)],
)
def test_a_place_that_is_not_in_the_arena_is_no_segfault(shared: Shared, block: int, length: int) -> None:
    for look in (shared.views.view, shared.views.copy):
        with pytest.raises(WireError, match="is not in the arena"):
            look(block, 1, length)


def test_a_view_outlives_the_object_that_made_it(shared: Shared) -> None:
    kept = shared.view(shared.lent())
    del shared.views
    gc.collect()
    assert kept == TEXT


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # by torch, once in a process
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_array_made_without_a_copy_pins_it(shared: Shared, library: str) -> None:
    module: Any = pytest.importorskip(library)
    for _ in range(2):
        segment = shared.lent()
        array = module.frombuffer(shared.view(segment), dtype=module.uint8)[5:]
        assert bytes(array[:1].tolist()) == TEXT[5:6]
        segment.view[5] = 7
        assert array[0] == 7
        assert shared.arena.used
        del array
        assert shared.arena.used == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on
def test_a_forked_child_neither_frees_a_body_nor_sees_another_in_its_place(shared: Shared) -> None:
    view: memoryview | None = shared.view(shared.lent())
    assert view is not None
    if (child := os.fork()) == 0:
        view = None
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert shared.arena.used, "its view was only a copy of ours"
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os._exit(view[0])
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV
