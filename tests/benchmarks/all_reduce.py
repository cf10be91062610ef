"""One all-reduce at the start, as a plain torchrun script and as a handler: the same code on both sides of the comparison.

It reads nothing of minserve, so that the script pays for torch and torchrun alone.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def reduce_once() -> None:
    """Joins the group and sums the ranks' numbers."""
    dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    expected = dist.get_world_size() * (dist.get_world_size() + 1) / 2
    if total.item() != expected:
        raise RuntimeError(f"the ranks' sum is {total.item()}, expected {expected}")


class FirstReduce:
    """The handler. READY means that the all-reduce is done."""

    def initialize(self, context: object) -> None:
        """All of the work."""
        reduce_once()

    def handle(self, data: list[object], context: object) -> list[str]:
        """Never called by the benchmark."""
        return ["" for _ in data]


if __name__ == "__main__":
    reduce_once()
    if os.environ["RANK"] == "0":
        print("reduced", flush=True)
    dist.destroy_process_group()
