import pytest

from minserve.wire.board import Vitals
from minserve.worker.blame import Cause, What
from minserve.worker.hang import find
from minserve.worker.signs import Signs
from minserve.worker.stacks import Stack

OUTSIDE = Stack(
    "Current thread 0x0002 (most recent call first):\n"
    '  File "/models/m/handler.py", line 12 in spin\n'
    '  File "/models/m/handler.py", line 5 in handle\n'
    '  File "/minserve/rank/process.py", line 99 in run_to_the_end\n'
)
INSIDE = Stack(
    "Current thread 0x0002 (most recent call first):\n"
    '  File "/lib/torch/distributed/distributed_c10d.py", line 3000 in all_reduce\n'
    '  File "/models/m/handler.py", line 6 in handle\n'
)
WAITS = Stack(
    "Current thread 0x0002 (most recent call first):\n"
    '  File "/minserve/rank/connection.py", line 60 in receive\n'
    '  File "/minserve/rank/loop.py", line 120 in _serve\n'
)
DUE = Cause(What.SILENCE, 0, 100, "did not finish batch 7 within 3 s", 50.0)


def signs(
    rank: int,
    stack: Stack | None = INSIDE,
    *,
    state: str = "S",
    silent: float = 0.2,
    finished: int = 6,
    collectives: int = 40,
) -> Signs:
    return Signs(rank, 100 + rank, state, silent, Vitals(9, 7, finished, 0, 0, collectives), stack)


def blamed(*group: Signs, due: Cause = DUE, suspects: tuple[int, ...] = (0, 1, 2)) -> tuple[int, What, str]:
    cause = find(group, suspects, 7, due)
    assert cause.pid == 100 + cause.rank
    assert cause.at == due.at
    return cause.rank, cause.what, cause.detail


def test_a_stopped_rank_comes_before_all_else() -> None:
    rank, what, detail = blamed(signs(0, OUTSIDE), signs(1, state="T"), signs(2, None, state="D", silent=30.0))
    assert (rank, what) == (1, What.STALL)
    assert detail == "is stopped; rank 0 did not finish batch 7 within 3 s"


def test_then_one_in_the_kernel() -> None:
    rank, what, detail = blamed(signs(0, OUTSIDE), signs(1, silent=30.0), signs(2, None, state="D"))
    assert (rank, what) == (2, What.STALL)
    assert detail.startswith("is stuck in the kernel; ")


def test_then_one_without_a_heartbeat() -> None:
    rank, what, detail = blamed(signs(0), signs(1, OUTSIDE, silent=12.0), signs(2))
    assert (rank, what) == (1, What.STALL)
    assert detail.startswith(
        "has had no heartbeat for 12.0 s, some C code holds the GIL (at handler.py:12 in spin); rank 0 did not"
    )


def test_then_the_one_outside_the_collective_in_which_the_others_wait() -> None:
    rank, what, detail = blamed(signs(0), signs(1, OUTSIDE), signs(2))
    assert (rank, what) == (1, What.SILENCE)
    assert detail == (
        "is outside torch.distributed, at handler.py:12 in spin while ranks 0, 2 wait in a collective; "
        "rank 0 did not finish batch 7 within 3 s"
    )


def test_of_several_outside_the_one_that_has_issued_the_fewest_collectives() -> None:
    """The others may wait for a collective by other means, such as a handle's `wait`."""
    assert blamed(signs(0, OUTSIDE), signs(1, OUTSIDE, collectives=39), signs(2, OUTSIDE))[0] == 1
    assert blamed(signs(0, OUTSIDE), signs(1, OUTSIDE), signs(2, OUTSIDE))[0] == 0, "no other sign: the one noticed"


def test_a_rank_that_has_left_the_batch_without_the_collective() -> None:
    rank, what, detail = blamed(signs(0), signs(1, WAITS, finished=7), signs(2))
    assert (rank, what) == (1, What.SILENCE)
    assert detail == (
        "has left batch 7 while ranks 0, 2 wait in a collective of it; rank 0 did not finish batch 7 within 3 s"
    )


def test_a_rank_that_waits_for_rank_0_after_its_answer() -> None:
    due = Cause(What.SILENCE, 1, 101, "did not finish batch 7 within 3 s of rank 0's answer", 50.0)
    assert blamed(signs(0, WAITS, finished=7), signs(1), due=due, suspects=(0, 1))[0] == 0
    rank, _, detail = blamed(signs(0, WAITS, finished=7), signs(1, OUTSIDE), due=due, suspects=(0, 1))
    assert rank == 1
    assert detail == "is at handler.py:12 in spin, and did not finish batch 7 within 3 s of rank 0's answer"


def test_where_all_wait_in_a_collective_the_one_with_the_fewest() -> None:
    rank, _, detail = blamed(signs(0), signs(1), signs(2, collectives=38))
    assert rank == 2
    assert detail.startswith("waits in a collective as all ranks do, after 38 of them; rank 0 did not")


@pytest.mark.parametrize("stack", [None, WAITS])
def test_where_nothing_tells_the_rank_that_was_noticed(stack: Stack | None) -> None:
    group = [signs(0, stack, finished=7), signs(1, stack, finished=7)]
    assert find(group, (0, 1), 7, DUE) is DUE


def test_ranks_that_have_reported_are_no_suspects() -> None:
    rank, _, _ = blamed(signs(0, OUTSIDE), signs(1), signs(2, OUTSIDE, collectives=41), suspects=(2,))
    assert rank == 2


def test_what_is_seen_is_told_in_a_line() -> None:
    assert str(signs(1, state="R")) == (
        "rank 1 (pid 101): process state R, no heartbeat for 0.2 s, batch 7 begun, 6 finished, 40 collectives issued"
    )
