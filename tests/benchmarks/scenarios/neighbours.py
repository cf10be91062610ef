"""The no-op in one process without ranks, beside servers that have no others."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests.benchmarks.contest import OURS, take_turns
from tests.benchmarks.figures import p50, rate
from tests.benchmarks.peers.starting import BARE, BATCH, LITSERVE, MOSEC, ONE, RAY, echo_server
from tests.benchmarks.peers.torchserve import TORCHSERVE
from tests.benchmarks.plot import Panel
from tests.benchmarks.report import Findings, compare
from tests.benchmarks.workspace import ECHO, Model

if TYPE_CHECKING:
    from tests.benchmarks.run import Run

SCENARIO = "no-op, 1 process"
OTHERS = (TORCHSERVE, MOSEC, LITSERVE, RAY, BARE)
MODELS = {1: ONE, 32: BATCH}  # by batchSize
LATENCY, UNBATCHED, BATCHED = p50(1, 1), rate(16, 1), rate(64, 32)


def measure(run: Run) -> Findings:
    """All servers are up at the same time; Ray's processes are never quite idle."""
    models = [Model(name, (ECHO,), ranks=0, batch_size=size) for size, name in MODELS.items()]
    rows, panels = [], []
    with ExitStack() as stack:
        ups = run.servers(stack, models)
        for name in (MOSEC, LITSERVE, RAY):
            with run.forgive(name):
                run.plan.tell(f"starting {name}")
                ups[name] = stack.enter_context(echo_server(run.workspace, run.environments, name))
        ups[BARE] = run.bare(stack)
        for figure in (LATENCY, UNBATCHED, BATCHED):
            contestants = {
                name: run.clients(up, "echo" if name == BARE else MODELS[figure.batch_size], figure.clients)
                for name, up in ups.items()
            }
            loads = take_turns(run, f"one process: {figure}", contestants)
            samples = {name: figure.of(loads, name) for name in (OURS, *OTHERS)}
            rows += [compare(SCENARIO, str(figure), figure.unit, samples[OURS], name, samples[name]) for name in OTHERS]
            if figure != LATENCY:
                panels.append(Panel.of(f"{SCENARIO}: {figure}", figure.unit, samples))
    return Findings(rows, panels)
