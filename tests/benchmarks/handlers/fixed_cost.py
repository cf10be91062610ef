"""A batch takes 5 ms, however many requests are in it: a device that is busy while the processors are not."""

from __future__ import annotations

import time
from typing import Any

COST_S = 0.005


def handle(data: list[dict[str, Any]] | None, context: Any) -> list[Any] | None:
    """Called once without data at load."""
    if data is None:
        return None
    time.sleep(COST_S)  # the cost itself
    return [row.get("data") or row.get("body") for row in data]
