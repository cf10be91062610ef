"""The same no-op on groups of other sizes: what a rank more costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.benchmarks.contest import OURS, take_turns
from tests.benchmarks.figures import p50, rate
from tests.benchmarks.plot import Panel
from tests.benchmarks.report import Aim, Findings, compare
from tests.benchmarks.workspace import ECHO, Model

if TYPE_CHECKING:
    from tests.benchmarks.run import Run

SCENARIO = "no-op, ranks"
BASE = 2
LATENCY, UNBATCHED, BATCHED = p50(1, 1), rate(16, 1), rate(64, 32)
AIM = Aim("≥", 0.8)  # batched, of the throughput of 2 ranks


def measure(run: Run) -> Findings:
    """All groups at each load."""
    sizes = sorted({BASE, *run.plan.ranks})
    models = {
        (ranks, batch): Model(f"echo-{ranks}-{batch}", (ECHO,), ranks=ranks, batch_size=batch)
        for ranks in sizes
        for batch in (1, 32)
    }
    rows, panels = [], []
    with run.server(OURS, list(models.values())) as up:
        for figure in (LATENCY, UNBATCHED, BATCHED):
            contestants = {
                str(ranks): run.clients(up, models[ranks, figure.batch_size].name, figure.clients) for ranks in sizes
            }
            loads = take_turns(run, f"ranks: {figure}", contestants)
            base = figure.of(loads, str(BASE))
            for ranks in sizes:
                if ranks != BASE:
                    aim = AIM if figure == BATCHED and ranks > BASE else None
                    ours = figure.of(loads, str(ranks))
                    what = f"{figure}, {ranks} rank{'s' * (ranks > 1)}"
                    rows.append(compare(SCENARIO, what, figure.unit, ours, f"{BASE} ranks", base, aim))
            if figure != LATENCY:
                samples = {f"minserve, {ranks}": figure.of(loads, str(ranks)) for ranks in sizes}
                panels.append(Panel.of(f"{SCENARIO}: {figure}", figure.unit, samples))
    return Findings(rows, panels)
