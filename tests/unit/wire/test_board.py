from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.wire.board import Board, Slot, Vitals

RANKS = 3


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    it = Board(tmp_path / "board", RANKS)
    yield it
    it.close()


@pytest.fixture
def slots(board: Board, tmp_path: Path) -> list[Slot]:
    return [Slot(tmp_path / "board", rank) for rank in range(RANKS)]


def test_a_board_begins_empty_and_only_its_owner_may_look_at_it(board: Board, tmp_path: Path) -> None:
    assert [board.read(rank) for rank in range(RANKS)] == [Vitals()] * RANKS
    status = (tmp_path / "board").stat()
    assert (status.st_mode & 0o777, status.st_size) == (0o600, 64 * RANKS)


@pytest.mark.usefixtures("board")
def test_the_board_of_another_worker_is_not_taken_over(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        Board(tmp_path / "board", RANKS)


def test_a_rank_without_a_board_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Slot(tmp_path / "board", 0)


@pytest.mark.parametrize("rank", range(RANKS))
def test_what_a_rank_writes_is_read_as_its_own_and_nobody_elses(board: Board, slots: list[Slot], rank: int) -> None:
    slots[rank].received(7)
    slots[rank].finished(6)
    slots[rank].stepped(5, 4)
    slots[rank].beat(2**63)
    slots[rank].beat(2**63 + 1)
    expected = Vitals(heartbeat=2, received=7, finished=6, stream=5, step=4, collectives=2**63 + 1)
    assert [board.read(other) for other in range(RANKS)] == [
        expected if other == rank else Vitals() for other in range(RANKS)
    ]


def test_steps_are_those_of_the_batch_that_counted_last(board: Board, slots: list[Slot]) -> None:
    seen = []
    for seq, step in [(1, 1), (1, 2), (3, 1)]:
        slots[1].stepped(seq, step)
        vitals = board.read(1)
        seen.append([vitals.step_of(batch) for batch in (1, 2, 3)])
    assert seen == [[1, 0, 0], [2, 0, 0], [0, 0, 1]]


def test_a_reader_between_two_writes_never_sees_the_last_streams_step_as_this_ones(
    board: Board, slots: list[Slot]
) -> None:
    """It would cancel a stream in which that rank has counted nothing."""
    slots[0].stepped(1, 5)
    between: list[Vitals] = []

    class Looking:
        """The slot's words, with a look at the board before and after each write."""

        words = slots[0]._words

        def __getitem__(self, index: int) -> int:
            return self.words[index]

        def __setitem__(self, index: int, value: int) -> None:
            self.words[index] = value
            between.append(board.read(0))

    slots[0]._words = Looking()  # type: ignore[assignment]  # as much of a memoryview as is used
    slots[0].stepped(2, 1)
    slots[0].stepped(2, 2)
    assert len(between) > 2
    steps = [vitals.step_of(2) for vitals in between]
    assert all(before <= after for before, after in itertools.pairwise(steps))
    assert steps[-1] == 2
    assert max(vitals.step_of(1) for vitals in between) < 5  # and the old stream's is gone


def test_a_board_outlives_its_file_and_its_writers(board: Board, slots: list[Slot], tmp_path: Path) -> None:
    (tmp_path / "board").unlink()
    slots[2].received(9)
    slots.clear()
    assert board.read(2).received == 9
