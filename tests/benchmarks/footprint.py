"""What the server process itself takes: memory after all the load it has had, and CPU while nobody asks anything."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil

from tests.benchmarks.report import Aim, absolute

if TYPE_CHECKING:
    from tests.benchmarks.plan import Plan
    from tests.benchmarks.report import Row

MEGABYTE = 1e6


def measure(plan: Plan, pid: int) -> list[Row]:
    """Of the server process alone; the ranks are the model's business."""
    server = psutil.Process(pid)
    plan.tell(f"watching the idle server for {plan.idle_seconds:g} s")
    before, began = server.cpu_times(), time.perf_counter()
    time.sleep(plan.idle_seconds)  # the measurement itself
    after, took = server.cpu_times(), time.perf_counter() - began
    # The kernel counts in ticks of 10 ms: 0.2 % of 5 s.
    busy = after.user + after.system - before.user - before.system
    return [
        absolute(
            "server's memory (RSS) after the load, 3 models, 12 ranks",
            server.memory_info().rss / MEGABYTE,
            "MB",
            Aim("≤", 80, " MB"),
        ),
        absolute("server's CPU when idle", 100 * max(0.0, busy) / took, "%", Aim("<", 1, " %")),
    ]
