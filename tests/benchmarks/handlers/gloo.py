"""gloo alone, a plain torchrun script: all-reduces of one number as fast as they go, for the seconds that a line asks for.

Rank 0 reads lines, `NUMBER SECONDS`, and prints how many there were. The number itself carries rank 0's word to the others.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist

GO, END = 0.0, 1.0
A_LOOK = 64  # all-reduces between two looks at the clock


def main() -> None:
    """Serves stdin until it is closed."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        dist.all_reduce(torch.tensor([GO]))
        print("ready", flush=True)
        for line in sys.stdin:
            number, seconds = line.split()
            began, count = time.perf_counter(), 0
            while (took := time.perf_counter() - began) < float(seconds):
                for _ in range(A_LOOK):
                    dist.all_reduce(torch.tensor([GO]))
                count += A_LOOK
            print(f"{number}: {count} in {took} s", flush=True)
        dist.all_reduce(torch.tensor([END]))
    else:
        word = torch.tensor([GO])
        while word.item() == GO:
            word = torch.tensor([GO])
            dist.all_reduce(word)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
