"""Two all-reduces a batch: every rank adds its bits of each nonce, so that only partners in the same batch make it whole."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from minserve.handlers import BaseHandler
from tests.chaos.models import orders


class TensorParallel(BaseHandler):
    def load(self, context: Any) -> None:
        orders.at_start("load")

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[object]:
        batch = orders.rows(data)
        orders.obey(batch, "before")
        time.sleep(max(row.get("work", 0.0) for row in batch))
        nonces = [row["nonce"] for row in batch]
        # Two with different numbers: a rank that is one collective behind meets a partner of another kind, and it shows.
        sums = [[0] * len(nonces)] * 2 if orders.told(batch, "skip") else [self.add(nonces), self.add(masked(nonces))]
        orders.obey(batch, "after")
        answers: list[object] = [
            {"nonce": nonce, "check": check, "world": self.world_size} for nonce, check in zip(*sums, strict=True)
        ]
        if orders.told(batch, "bad_count"):
            return [*answers, "one too many"]
        return [object() for _ in batch] if orders.told(batch, "bad_type") else answers

    def add(self, numbers: list[int]) -> list[int]:
        """The numbers again, after each rank has contributed its bits."""
        pieces = torch.tensor([orders.piece(number, self.rank, self.world_size) for number in numbers])
        if self.world_size > 1:
            dist.all_reduce(pieces)
        whole: list[int] = pieces.tolist()
        return whole


def masked(nonces: list[int]) -> list[int]:
    return [nonce ^ 0xABC for nonce in nonces]
