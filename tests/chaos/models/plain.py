"""One process without torch: the cheapest worker there is to kill."""

from __future__ import annotations

import time
from typing import Any

from tests.chaos.models import orders


class Plain:
    def initialize(self, context: Any) -> None:
        orders.at_start("load")

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[object]:
        batch = orders.rows(data)
        orders.obey(batch, "before")
        time.sleep(max(row.get("work", 0.0) for row in batch))
        orders.obey(batch, "after")
        answers: list[object] = [{"nonce": row["nonce"], "check": row["nonce"] ^ 0xABC, "world": 1} for row in batch]
        if orders.told(batch, "bad_count"):
            return [*answers, "one too many"]
        return [object() for _ in batch] if orders.told(batch, "bad_type") else answers
