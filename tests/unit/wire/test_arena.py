from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minserve.wire.arena import BLOCK_BYTES, IDLE_S, REST_BLOCKS, Arena, Marks, Segment, new_memory

BLOCKS = 8
READERS = 2


def new_arena(blocks: int = BLOCKS) -> Arena:
    return Arena(new_memory("test", blocks * BLOCK_BYTES))


def new_marks(readers: int = READERS, blocks: int = BLOCKS) -> Marks:
    descriptor = new_memory("test", Marks.size(readers, blocks))
    try:
        return Marks(descriptor, readers)
    finally:
        os.close(descriptor)


def allocated(arena: Arena, length: int) -> Segment:
    segment = arena.allocate(length)
    assert segment is not None
    return segment


def test_a_segment_has_just_the_length_that_was_asked_for_and_takes_whole_blocks() -> None:
    arena = new_arena()
    segment = allocated(arena, BLOCK_BYTES + 1)
    assert len(segment.view) == BLOCK_BYTES + 1
    assert arena.used == 2 * BLOCK_BYTES
    segment.release()
    assert arena.used == 0


def test_what_does_not_fit_is_refused_now_or_for_ever() -> None:
    arena = new_arena()
    assert arena.allocate(BLOCKS * BLOCK_BYTES + 1) is None
    first, second = allocated(arena, 4 * BLOCK_BYTES), allocated(arena, 3 * BLOCK_BYTES)
    assert arena.allocate(2 * BLOCK_BYTES) is None
    first.release()
    assert allocated(arena, 2 * BLOCK_BYTES).block == 0, "the lowest address is the warmest"
    second.release()


def test_a_segment_is_free_when_every_reader_has_marked_it() -> None:
    arena, marks = new_arena(), new_marks()
    segment = allocated(arena, 1)
    segment.lend(marks)
    marks.rows[0][segment.block] = segment.use
    segment.release()
    assert arena.used, "one reader still looks"
    marks.rows[1][segment.block] = segment.use
    assert arena.used == 0


def test_a_segment_is_not_free_before_its_owner_has_released_it() -> None:
    arena, marks = new_arena(), new_marks()
    segment = allocated(arena, 1)
    segment.lend(marks)
    for row in marks.rows:
        row[segment.block] = segment.use
    assert arena.used, "it may be lent to the next worker"
    segment.release()
    segment.release()
    assert arena.used == 0


def test_a_segment_of_two_workers_is_free_when_both_are_through_with_it() -> None:
    arena, dead, alive = new_arena(), new_marks(), new_marks(1)
    segment = allocated(arena, 1)
    segment.lend(dead)
    segment.lend(alive)
    segment.release()
    dead.over = True
    assert arena.used, "the second worker is at it"
    alive.rows[0][segment.block] = segment.use
    assert arena.used == 0


def test_a_mark_of_an_earlier_use_frees_nothing() -> None:
    arena, marks = new_arena(), new_marks(1)
    first = allocated(arena, 1)
    first.release()
    second = allocated(arena, 1)
    assert (second.block, second.use) != (first.block, first.use)
    second.lend(marks)
    second.release()
    marks.rows[0][first.block] = first.use
    assert arena.used


def test_memory_that_is_idle_goes_back_from_the_top_down_to_what_is_in_use() -> None:
    arena = new_arena(3 * REST_BLOCKS)
    used, free = allocated(arena, BLOCK_BYTES), allocated(arena, 2 * REST_BLOCKS * BLOCK_BYTES)
    used.view[:] = b"x" * used.length
    free.view[:] = b"x" * free.length
    free.release()
    reader = arena.open_for_readers()

    def held() -> int:
        return os.fstat(reader).st_blocks * 512 // BLOCK_BYTES

    arena.rest(100.0)
    arena.rest(100.0 + IDLE_S - 1)
    assert held() == 1 + 2 * REST_BLOCKS, "not yet"
    arena.rest(100.0 + IDLE_S)
    assert held() == 1 + REST_BLOCKS, "a part of it"
    for _ in range(3):
        arena.rest(100.0 + IDLE_S)
    assert held() == 1
    assert used.view == b"x" * used.length
    used.release()
    arena.rest(200.0)
    assert held() == 0
    allocated(arena, BLOCK_BYTES).view[:] = b"x" * BLOCK_BYTES
    for now in (300.0, 400.0):
        arena.rest(now)
        assert held() == 1, "it is in use again"
    os.close(reader)


def test_readers_cannot_write_and_nobody_can_cut_the_memory() -> None:
    arena = new_arena()
    reader = arena.open_for_readers()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(reader, b"x")
    whole = os.open(f"/proc/self/fd/{reader}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.ftruncate(whole, 0)
    os.close(whole)
    os.close(reader)


def test_the_descriptor_is_closed_with_the_arena() -> None:
    before = set(os.listdir("/proc/self/fd"))
    arena = new_arena()
    assert set(os.listdir("/proc/self/fd")) != before
    del arena
    assert set(os.listdir("/proc/self/fd")) == before


# What a test does next: allocate so many bytes, or let the owner or a reader be through with one of those that there are.
STEPS = st.lists(
    st.tuples(st.sampled_from(["new", "owner", *range(READERS)]), st.integers(1, 5 * BLOCK_BYTES)), max_size=60
)


@given(STEPS)
def test_no_two_segments_in_use_overlap_and_all_are_free_in_the_end(steps: list[tuple[str | int, int]]) -> None:
    arena, marks = new_arena(), new_marks()
    waited_for: dict[Segment, set[str | int]] = {}  # who is not through with it

    def over(segment: Segment, who: str | int) -> None:
        assert bytes(segment.view[:1]) == bytes(segment.view[-1:]) == bytes([segment.use % 256]), "overwritten"
        waited_for[segment].discard(who)
        if not waited_for[segment]:
            del waited_for[segment]
        if isinstance(who, int):
            marks.rows[who][segment.block] = segment.use
        else:
            segment.release()

    for what, number in steps:
        if what == "new":
            segment = arena.allocate(number)
            if segment is not None:
                segment.view[:1] = segment.view[-1:] = bytes([segment.use % 256])
                segment.lend(marks)
                waited_for[segment] = {"owner", *range(READERS)}
        else:
            waiting = [segment for segment, who in waited_for.items() if what in who]
            if waiting:
                over(waiting[number % len(waiting)], what)
        spans = sorted((one.block, one.block - (-one.length // BLOCK_BYTES)) for one in waited_for)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert arena.used == sum(end - start for start, end in spans) * BLOCK_BYTES
    for segment, who in list(waited_for.items()):
        for one in list(who):
            over(segment, one)
    assert arena.used == 0
    assert allocated(arena, BLOCKS * BLOCK_BYTES).block == 0, "nothing is lost to fragments"


def test_a_closed_arena_is_gone_with_the_last_look_at_it() -> None:
    def mapped() -> int:
        return sum("memfd:closed" in line for line in Path("/proc/self/maps").read_text().splitlines())

    descriptor = new_memory("closed", 4 * BLOCK_BYTES)
    arena = Arena(descriptor)
    segment = arena.allocate(5)
    assert segment is not None
    segment.view[:] = b"bytes"
    arena.close()
    assert arena.allocate(1) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    with pytest.raises(OSError, match="No such file"):
        arena.open_for_readers()
    assert (mapped(), bytes(segment.view)) == (1, b"bytes")
    segment.release()
    assert arena.used == 0
    arena.rest(1e9)
    del segment
    assert mapped() == 0
