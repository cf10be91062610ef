"""The no-op in one process without ranks, beside servers that have no others."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests.benchmarks.contest import OURS, Loads, pick, take_turns
from tests.benchmarks.peers.starting import BARE, BATCH, LITSERVE, MOSEC, ONE, RAY, echo_server
from tests.benchmarks.peers.torchserve import TORCHSERVE
from tests.benchmarks.plot import Panel
from tests.benchmarks.report import Findings, compare
from tests.benchmarks.workspace import ECHO, Model

if TYPE_CHECKING:
    from tests.benchmarks.run import Run
    from tests.benchmarks.servers import Up

SCENARIO = "no-op, 1 process"
OTHERS = (TORCHSERVE, MOSEC, LITSERVE, RAY, BARE)
BATCHES = {ONE: 1, BATCH: 32}
FIGURES = (  # clients, model, attribute, what, unit
    (1, ONE, "p50_us", "p50", "µs"),
    (16, ONE, "requests_per_s", "requests/s", ""),
    (64, BATCH, "requests_per_s", "requests/s", ""),
)


def measure(run: Run) -> Findings:
    """All servers are up at the same time; Ray's processes are never quite idle."""
    models = [Model(name, (ECHO,), ranks=0, batch_size=size) for name, size in BATCHES.items()]
    with ExitStack() as stack:
        ups = run.servers(stack, models)
        for name in (MOSEC, LITSERVE, RAY):
            with run.forgive(name):
                ups[name] = stack.enter_context(echo_server(run.workspace, run.environments, name))
        ups[BARE] = run.bare(stack)
        found = [_load(run, ups, clients, model) for clients, model, *_ in FIGURES]
    rows, panels = [], []
    for loads, (clients, model, attribute, figure, unit) in zip(found, FIGURES, strict=True):
        what = f"{figure}, {clients} client{'s' * (clients > 1)}, batchSize {BATCHES[model]}"
        ours = pick(loads, OURS, attribute)
        rows += [compare(SCENARIO, what, unit, ours, name, pick(loads, name, attribute)) for name in OTHERS]
        samples = {name: pick(loads, name, attribute) for name in (OURS, *OTHERS)}
        panels.append(Panel.of(f"{SCENARIO}: {what}", unit, samples))
    return Findings(rows, panels[1:])


def _load(run: Run, ups: dict[str, Up], clients: int, model: str) -> Loads:
    contestants = {name: run.clients(up, "echo" if name == BARE else model, clients) for name, up in ups.items()}
    return take_turns(run, f"one process, {clients} clients, {model}", contestants)
