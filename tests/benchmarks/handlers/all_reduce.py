"""An all-reduce at the start and one for each batch, as a handler, and the first of them as a plain torchrun script.

It reads nothing of minserve: TorchServe and torchrun run the same file.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist

LOAD = b'"load"'


def reduce_once() -> None:
    """Sums the ranks' numbers."""
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    expected = dist.get_world_size() * (dist.get_world_size() + 1) / 2
    if total.item() != expected:
        raise RuntimeError(f"the ranks' sum is {total.item()}, expected {expected}")


class AllReduce:
    """The handler."""

    def initialize(self, context: Any) -> None:
        """Joins the group. READY means that the first all-reduce is done."""
        began = time.perf_counter()
        dist.init_process_group("gloo")
        reduce_once()
        self.load_s = time.perf_counter() - began

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Bodies come back; for `LOAD` the seconds that `initialize` took."""
        reduce_once()
        bodies = [row.get("data") or row.get("body") for row in data]
        return [str(self.load_s) if body == LOAD else body for body in bodies]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    reduce_once()
    if os.environ["RANK"] == "0":
        print("reduced", flush=True)
    dist.destroy_process_group()
