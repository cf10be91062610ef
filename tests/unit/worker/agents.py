from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

if TYPE_CHECKING:
    from collections.abc import Mapping


def torchrun_says(exits: Mapping[int, int], first: int) -> str:
    """What the installed torchrun prints at its end when ranks have ended with these codes; the pid is 1000 + rank."""
    failures = {rank: ProcessFailure(rank, 1000 + rank, code, "<N/A>") for rank, code in exits.items()}
    for rank, failure in failures.items():
        failure.timestamp = 0 if rank == first else 1
    return (
        f"E1125 08:35:19 9 torch/elastic/api.py:1002] failed (exitcode: {exits[first]}) local_rank: {first} (pid: 9)\n"
        f"Traceback (most recent call last):\n  of torchrun's own\n{ChildFailedError('minserve.rank', failures)}\n"
    )
