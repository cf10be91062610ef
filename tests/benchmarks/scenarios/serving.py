"""What the fan-out to two ranks costs: a handler that does nothing, and one with an all-reduce for each batch.

Both at 1, 16 and 64 clients, one request a batch and up to 32, beside TorchServe; the first beside bare aiohttp, the second
beside gloo alone. CPU for a request is read over the same loads.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests.benchmarks.contest import OURS, take_turns
from tests.benchmarks.figures import p50, p99, ranks_cpu, rate, server_cpu
from tests.benchmarks.peers.gloo import GLOO, gloo_alone
from tests.benchmarks.peers.starting import BARE
from tests.benchmarks.peers.torchserve import TORCHSERVE
from tests.benchmarks.plot import Panel
from tests.benchmarks.report import Aim, Findings, compare
from tests.benchmarks.workspace import ECHO, HANDLERS, Model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.benchmarks.contest import Contestant, Loads
    from tests.benchmarks.figures import Figure
    from tests.benchmarks.run import Run
    from tests.benchmarks.servers import Up

MODELS = {1: "one", 32: "batch"}  # by batchSize
CLIENTS = (1, 16, 64)
DEDICATED = "minserve:\n  scheduling: batch\n"
LATENCY, UNBATCHED, BATCHED = p50(1, 1), rate(16, 1), rate(64, 32)
TIMES = (LATENCY, p99(1, 1), p50(1, 32))
RATES = (UNBATCHED, rate(64, 1), rate(16, 32), BATCHED)
SERVER_CPU = (server_cpu(16, 1), server_cpu(64, 32))
RANKS_CPU = (ranks_cpu(16, 1), ranks_cpu(64, 32))
# What each of the others can be compared in: bare aiohttp has no ranks, and gloo alone neither requests nor batches.
FIGURES = {
    TORCHSERVE: TIMES + RATES + SERVER_CPU + RANKS_CPU,
    BARE: TIMES + RATES + SERVER_CPU,
    GLOO: (UNBATCHED, rate(64, 1)),
}
NO_OP_AIMS = {
    (TORCHSERVE, LATENCY): Aim("≤", 1 / 6),
    (TORCHSERVE, UNBATCHED): Aim("≥", 10),
    (TORCHSERVE, BATCHED): Aim("≥", 3),
    (BARE, LATENCY): Aim("≤", 1.6),
    (BARE, UNBATCHED): Aim("≥", 0.55),
    (BARE, BATCHED): Aim("≥", 0.9),
}
ALL_REDUCE_AIMS = {
    (TORCHSERVE, UNBATCHED): Aim("≥", 3.5),
    (TORCHSERVE, BATCHED): Aim("≥", 3),
    (GLOO, UNBATCHED): Aim("≥", 0.7),
}


def no_op(run: Run) -> Findings:
    """The echo handler."""
    with ExitStack() as stack:
        ups = _start(run, stack, ECHO)
        bare = run.bare(stack)
        loads = {}
        for clients in CLIENTS:
            contestants = {**_contestants(run, ups, clients), BARE: run.clients(bare, "echo", clients)}
            loads[clients] = take_turns(run, f"no-op, {clients} clients", contestants)
    return _report("no-op, 2 ranks", loads, BARE, NO_OP_AIMS)


def all_reduce(run: Run) -> Findings:
    """The echo handler with an all-reduce of one number."""
    return _all_reduce(run, "all-reduce, 2 ranks")


def all_reduce_dedicated(run: Run) -> Findings:
    """The same, configured for a machine that has nothing else to do."""
    return _all_reduce(run, "all-reduce, 2 ranks, scheduling: batch", DEDICATED)


def _all_reduce(run: Run, scenario: str, more: str = "") -> Findings:
    with ExitStack() as stack:
        ups = _start(run, stack, HANDLERS / "all_reduce.py", more)
        gloo = stack.enter_context(gloo_alone(run.workspace))
        loads = {}
        for clients in CLIENTS:
            contestants = {**_contestants(run, ups, clients), GLOO: gloo}
            loads[clients] = take_turns(run, f"{scenario}, {clients} clients", contestants)
    return _report(scenario, loads, GLOO, ALL_REDUCE_AIMS)


def _start(run: Run, stack: ExitStack, handler: Path, more: str = "") -> Sequence[Up]:
    models = [Model(name, (handler,), batch_size=size, more=more) for size, name in MODELS.items()]
    return list(run.servers(stack, models).values())


def _contestants(run: Run, ups: Sequence[Up], clients: int) -> dict[str, Contestant]:
    return {_key(up.name, size): run.clients(up, name, clients) for up in ups for size, name in MODELS.items()}


def _key(name: str, batch_size: int) -> str:
    """Of a contestant. The floors have no batches."""
    return f"{name}, batchSize {batch_size}" if name in (OURS, TORCHSERVE) else name


def _report(scenario: str, loads: Mapping[int, Loads], floor: str, aims: Mapping[tuple[str, Figure], Aim]) -> Findings:
    def of(name: str, figure: Figure) -> list[float]:
        return figure.of(loads[figure.clients], _key(name, figure.batch_size))

    rows = []
    for other in (TORCHSERVE, floor):
        for figure in FIGURES[other]:
            aim = aims.get((other, figure))
            ours, theirs = of(OURS, figure), of(other, figure)
            rows.append(compare(scenario, str(figure), figure.unit, ours, other, theirs, aim, headline=aim is not None))
    panels = [
        Panel.of(f"{scenario}: {figure}", figure.unit, {name: of(name, figure) for name in (OURS, TORCHSERVE, floor)})
        for figure in ((LATENCY, UNBATCHED, BATCHED) if floor == BARE else (UNBATCHED, BATCHED))
    ]
    return Findings(rows, panels)
