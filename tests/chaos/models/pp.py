"""A pipeline: stage s makes 3 · x + s + 1 of each nonce, and the result goes back to rank 0."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from minserve.handlers import BaseHandler, Pipeline
from tests.chaos.models import orders


class Stages(BaseHandler):
    def load(self, context: Any) -> None:
        self.pipeline = Pipeline(self.device)
        orders.at_start("load")

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[object] | None:
        batch = orders.rows(data)
        orders.obey(batch, "before")

        def stage(numbers: Tensor) -> Tensor:
            orders.obey(batch, "stage")
            time.sleep(max(row.get("work", 0.0) for row in batch))
            return numbers * 3 + self.rank + 1

        result = self.pipeline.run(stage, torch.tensor([row["nonce"] for row in batch]))
        orders.obey(batch, "after")
        if result is None:
            return None
        answers: list[object] = [
            {"nonce": row["nonce"], "check": number, "world": self.world_size}
            for row, number in zip(batch, result[0].tolist(), strict=True)
        ]
        if orders.told(batch, "bad_count"):
            return [*answers, "one too many"]
        return [object() for _ in batch] if orders.told(batch, "bad_type") else answers
