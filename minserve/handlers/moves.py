"""How the ranks of the first stage agree on the next move, where tensor parallelism makes them several."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from minserve.rank.failures import leave_out
from minserve.rank.order import Move

MOST_UNHEARD = 16  # moves; a rank that is further behind is waited for


class Moves:
    """A line from the first of some ranks to the others. A collective call of these ranks.

    On gloo also beside NCCL: a move is two numbers in the memory of the CPU, and no GPU is to wait for them.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = ranks
        self._group = dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
        leave_out(self._group)
        self._unheard: deque[tuple[torch.Tensor, dist.Work]] = deque()

    def tell(self, move: Move) -> None:
        """Tells the other ranks, without waiting for them."""
        message = torch.tensor([move.seq, move.starts], device="cpu")  # whatever the handler's default is
        for rank in self._ranks[1:]:
            work = dist.isend(message, rank, group=self._group)
            assert work is not None
            self._unheard.append((message, work))
        while len(self._unheard) > MOST_UNHEARD * len(self._ranks):
            self._unheard.popleft()[1].wait()

    def hear(self) -> Move:
        """Waits for the next move of the first rank."""
        message = torch.empty(2, dtype=torch.int64, device="cpu")
        dist.recv(message, self._ranks[0], group=self._group)
        seq, starts = message.tolist()
        return Move(seq, bool(starts))
