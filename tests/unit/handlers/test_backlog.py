from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minserve.handlers.backlog import Backlog, behind, close_off, lost
from minserve.rank.failures import is_collective
from minserve.rank.threads import HOP_THREAD
from tests.unit.handlers.wire import Wire
from tests.unit.rank.rig import DEADLINE_S, Running


def number(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def sender() -> threading.Thread:
    return next(thread for thread in threading.enumerate() if thread.name == HOP_THREAD)


@pytest.mark.parametrize(
    ("taken", "rest"),
    [
        (0, [[1, 2], [3], [4, 5]]),
        (1, [[2], [3], [4, 5]]),
        (2, [[3], [4, 5]]),
        (3, [[4, 5]]),
        (4, [[5]]),
        (5, []),
    ],
)
def test_behind_so_many_bytes_lies_the_rest(taken: int, rest: list[list[int]]) -> None:
    assert [piece.tolist() for piece in behind([number(1, 2), number(3), number(4, 5)], taken)] == rest


def test_the_rest_is_no_copy() -> None:
    whole = number(1, 2, 3)
    (rest,) = behind([whole], 1)
    whole[2] = 9
    assert rest.tolist() == [2, 9]


def test_it_is_busy_until_the_last_byte_is_out_and_a_rest_waits_for_no_other() -> None:
    wire = Wire()
    backlog = Backlog(wire.socket, "rank 1")
    seen = [backlog.busy]
    first, second = backlog.add([number(1, 2), number(3)]), backlog.add([number(4)])
    assert wire.next_blocked() == 3
    wire.let(2)
    assert wire.next_blocked() == 1, "what was not taken comes again, and nothing in front of it"
    wire.let(1)
    first.wait()
    assert first.pieces == []
    assert wire.next_blocked() == 1
    seen.append(backlog.busy)
    thread = sender()
    wire.let(1)
    second.wait()
    thread.join(DEADLINE_S)
    assert [*seen, backlog.busy] == [False, True, False]
    assert wire.taken == bytes([1, 2, 3, 4])


def test_after_a_rest_another_thread_sends_the_next_one() -> None:
    wire = Wire()
    backlog = Backlog(wire.socket, "rank 1")
    for value in (1, 2):
        rest = backlog.add([number(value)])
        wire.next_blocked()
        thread = sender()
        wire.let(1)
        rest.wait()
        thread.join(DEADLINE_S)
    assert wire.taken == bytes([1, 2])


def test_several_threads_may_wait_for_the_same_rest() -> None:
    wire = Wire()
    rest = Backlog(wire.socket, "rank 1").add([number(1)])
    waiting = [Running(rest.wait) for _ in range(3)]
    wire.let(1)
    for one in waiting:
        one.result()
    rest.wait()


@pytest.mark.parametrize("error", [BrokenPipeError(), MemoryError()])
def test_an_error_ends_all_that_is_on_its_way_and_nothing_follows_half_a_message(error: Exception) -> None:
    wire = Wire()
    backlog = Backlog(wire.socket, "rank 1")
    out, half, behind_it = backlog.add([number(7)]), backlog.add([number(1, 2)]), backlog.add([number(3)])
    wire.next_blocked()
    thread = sender()
    wire.let(1, 1)
    wire.next_blocked(), wire.next_blocked()
    wire.let(error)
    for rest in (half, behind_it):
        with pytest.raises(dist.DistNetworkError, match="the connection to rank 1 is closed") as gone:
            rest.wait()
        assert gone.value.__cause__ is error
        assert is_collective(gone.value)
    out.wait()
    thread.join(DEADLINE_S)
    assert not backlog.busy
    assert wire.taken == bytes([7, 1]) + b"shut down"


def test_what_is_lost_is_an_error_of_the_group() -> None:
    assert is_collective(lost("rank 3"))
    assert "rank 3" in str(lost("rank 3"))


def test_closing_off_a_connection_that_is_gone_already_is_no_error() -> None:
    class Gone(Wire):
        def shutdown(self, how: int) -> None:
            raise OSError

    close_off(Gone().socket)
