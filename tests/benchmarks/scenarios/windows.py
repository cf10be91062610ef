"""When a batch is cut: the handler takes 5 ms for a batch of up to 8, a batch may wait 50 ms for company. Open-loop load.

Low load: a request should not wait for company that does not come. High load: batches fill by themselves.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.benchmarks.contest import OURS, pick, take_turns
from tests.benchmarks.peers.torchserve import TORCHSERVE
from tests.benchmarks.plot import Panel
from tests.benchmarks.report import Findings, compare
from tests.benchmarks.workspace import HANDLERS, Model

if TYPE_CHECKING:
    from tests.benchmarks.run import Run

SCENARIO = "batching, 2 ranks, open loop"
MODEL = Model("fixed", (HANDLERS / "fixed_cost.py",), batch_size=8, delay=50)
# Requests a second; full batches, one after the other, would be 1,600.
RATES = {"low": 40, "medium": 400, "saturating": 1000}


def measure(run: Run) -> Findings:
    """Both servers at each rate."""
    rows, panels = [], []
    with ExitStack() as stack:
        ups = run.servers(stack, [MODEL]).values()
        for load, rate in RATES.items():
            contestants = {up.name: replace(run.clients(up, MODEL.name, 0), rate=rate) for up in ups}
            loads = take_turns(run, f"batching, {rate} requests/s", contestants)
            for attribute, figure in (("p50_us", "p50"), ("p99_us", "p99")):
                times = {name: [us / 1000 for us in pick(loads, name, attribute)] for name in (OURS, TORCHSERVE)}
                what = f"{figure}, {load} load ({rate} /s)"
                rows.append(
                    compare(SCENARIO, what, "ms", times[OURS], TORCHSERVE, times[TORCHSERVE], headline=load == "low")
                )
                panels.append(Panel.of(f"{SCENARIO}: {what}", "ms", times))
    return Findings(rows, panels[::2])
