"""The same no-op on groups of other sizes: what a rank more costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.benchmarks.contest import OURS, pick, take_turns
from tests.benchmarks.plot import Panel
from tests.benchmarks.report import Aim, Findings, compare
from tests.benchmarks.workspace import ECHO, Model

if TYPE_CHECKING:
    from tests.benchmarks.run import Run

SCENARIO = "no-op, ranks"
BASE = 2
LOADS = ((1, 1), (16, 1), (64, 32))  # clients, batchSize
MOST = Aim("≥", 0.8)  # of the throughput of 2 ranks, batched: the cores are what 8 ranks lack


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
        for clients, batch in LOADS:
            contestants = {str(ranks): run.clients(up, models[ranks, batch].name, clients) for ranks in sizes}
            loads = take_turns(run, f"ranks, {clients} clients, batchSize {batch}", contestants)
            attribute, what, unit = ("p50_us", "p50", "µs") if clients == 1 else ("requests_per_s", "requests/s", "")
            base = pick(loads, str(BASE), attribute)
            what = f"{what}, {clients} client{'s' * (clients > 1)}, batchSize {batch}"
            for ranks in sizes:
                if ranks != BASE:
                    aim = MOST if batch > 1 and ranks > BASE else None
                    ours = pick(loads, str(ranks), attribute)
                    rows.append(compare(SCENARIO, f"{what}, {ranks} ranks", unit, ours, f"{BASE} ranks", base, aim))
            samples = {f"minserve, {ranks}": pick(loads, str(ranks), attribute) for ranks in sizes}
            panels.append(Panel.of(f"{SCENARIO}: {what}", unit, samples))
    return Findings(rows, panels[1:])
