"""A handler as an author of a model may have it: adds over its ranks, streams, and fails when asked to."""

import hashlib
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from minserve.handlers import BaseHandler


class Tested(BaseHandler):
    def load(self, context):
        print(f"loading on rank {self.rank}")
        if self.rank == 1 and os.environ.get("NO_WEIGHTS"):
            raise FileNotFoundError("no weights for rank 1")
        self.batches = 0

    def handle(self, data, context):
        bodies = [bytes(row["body"]) if isinstance(row["body"], bytearray) else row["body"] for row in data]
        self.batches += 1
        digest = hashlib.sha256(repr(bodies).encode()).hexdigest()[:16]
        print(f"batch {self.batches} of {len(bodies)}: {digest}", flush=True)
        if bodies[0] == "wait" and self.rank == 1:
            self.stuck_here()
        if bodies[0] == b"poison" and self.rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if bodies[0] == "count":
            return self.count()
        lengths = torch.tensor([float(len(body)) for body in bodies]) * (self.rank + 1)
        dist.all_reduce(lengths)
        if bodies[0] == "bad":
            raise ValueError("bad request")
        return [{"sum": length, "batch": len(bodies)} for length in lengths.tolist()]

    def stuck_here(self):
        while not Path(os.environ["RELEASE"]).exists():
            time.sleep(0.02)

    def count(self):
        for number in range(3):
            yield [f"{number} "]
