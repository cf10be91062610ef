"""What the fan-out to two ranks costs: a handler that does nothing, and one with an all-reduce for each batch.

Both at 1, 16 and 64 clients, one request a batch and up to 32, beside TorchServe; the first beside bare aiohttp, the second
beside gloo alone. CPU for a request is read over the same loads.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.benchmarks.contest import OURS, pick, take_turns
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
    from tests.benchmarks.report import Row
    from tests.benchmarks.run import Run
    from tests.benchmarks.servers import Up

ONE, BATCH = "one", "batch"
BATCHES = {ONE: 1, BATCH: 32}
CLIENTS = (1, 16, 64)


@dataclass(frozen=True, slots=True)
class Aims:
    """By the other's name: p50 at 1 client, unbatched at 16, batched at 64."""

    p50: Mapping[str, Aim]
    unbatched: Mapping[str, Aim]
    batched: Mapping[str, Aim]


NO_OP = Aims(
    p50={TORCHSERVE: Aim("≤", 1 / 6), BARE: Aim("≤", 1.6)},
    unbatched={TORCHSERVE: Aim("≥", 10), BARE: Aim("≥", 0.55)},
    batched={TORCHSERVE: Aim("≥", 3), BARE: Aim("≥", 0.9)},
)
ALL_REDUCE = Aims(p50={}, unbatched={TORCHSERVE: Aim("≥", 3.5), GLOO: Aim("≥", 0.7)}, batched={TORCHSERVE: Aim("≥", 3)})


def no_op(run: Run) -> Findings:
    """The echo handler."""
    with ExitStack() as stack:
        ups = _start(run, stack, ECHO)
        bare = run.bare(stack)
        loads = {}
        for clients in CLIENTS:
            contestants = _contestants(run, ups, clients)
            contestants[BARE] = run.clients(bare, "echo", clients)
            loads[clients] = take_turns(run, f"no-op, {clients} clients", contestants)
    return _report("no-op, 2 ranks", loads, BARE, NO_OP)


def all_reduce(run: Run) -> Findings:
    """The echo handler with an all-reduce of one number."""
    with ExitStack() as stack:
        ups = _start(run, stack, HANDLERS / "all_reduce.py")
        gloo = stack.enter_context(gloo_alone(run.workspace))
        loads = {}
        for clients in CLIENTS:
            contestants = {**_contestants(run, ups, clients), GLOO: gloo}
            loads[clients] = take_turns(run, f"all-reduce, {clients} clients", contestants)
    return _report("all-reduce, 2 ranks", loads, GLOO, ALL_REDUCE)


def _start(run: Run, stack: ExitStack, handler: Path) -> list[Up]:
    models = [Model(name, (handler,), batch_size=size) for name, size in BATCHES.items()]
    return list(run.servers(stack, models).values())


def _contestants(run: Run, ups: Sequence[Up], clients: int) -> dict[str, Contestant]:
    return {_key(up.name, model): run.clients(up, model, clients) for up in ups for model in BATCHES}


def _key(name: str, model: str) -> str:
    return f"{name}, batchSize {BATCHES[model]}"


@dataclass(frozen=True, slots=True)
class _Figure:
    """What a row compares: an attribute of `Load` of a model at some number of clients."""

    what: str
    unit: str
    attribute: str
    clients: int
    model: str


P50 = _Figure("p50", "µs", "p50_us", 1, ONE)
UNBATCHED = _Figure("requests/s", "", "requests_per_s", 16, ONE)
BATCHED = _Figure("requests/s", "", "requests_per_s", 64, BATCH)
RATES = (
    UNBATCHED,
    _Figure("requests/s", "", "requests_per_s", 64, ONE),
    _Figure("requests/s", "", "requests_per_s", 16, BATCH),
    BATCHED,
)
TIMES = (P50, _Figure("p99", "µs", "p99_us", 1, ONE), _Figure("p50", "µs", "p50_us", 1, BATCH))
SERVER_CPU = tuple(
    _Figure("server's CPU a request", "µs", "server_cpu_us", clients, model)
    for clients, model in ((16, ONE), (64, BATCH))
)
RANKS_CPU = tuple(
    _Figure("ranks' CPU a request", "µs", "ranks_cpu_us", clients, model) for clients, model in ((16, ONE), (64, BATCH))
)
# What each of the others can be compared in: bare aiohttp has no ranks, and gloo alone neither requests nor batches.
FIGURES = {TORCHSERVE: TIMES + RATES + SERVER_CPU + RANKS_CPU, BARE: TIMES + RATES + SERVER_CPU, GLOO: RATES[:2]}


def _report(scenario: str, loads: Mapping[int, Loads], floor: str, aims: Aims) -> Findings:
    rows = []
    for other in (TORCHSERVE, floor):
        by_figure = {P50: aims.p50, UNBATCHED: aims.unbatched, BATCHED: aims.batched}
        for figure in FIGURES[other]:
            aim = by_figure.get(figure, {}).get(other)
            rows.append(_row(scenario, figure, loads[figure.clients], other, floor, aim))
    return Findings(rows, _panels(scenario, loads, floor))


def _row(scenario: str, figure: _Figure, loads: Loads, other: str, floor: str, aim: Aim | None) -> Row:
    ours = pick(loads, _key(OURS, figure.model), figure.attribute)
    theirs = pick(loads, other if other == floor else _key(other, figure.model), figure.attribute)
    plural = "s" if figure.clients > 1 else ""
    what = f"{figure.what}, {figure.clients} client{plural}, batchSize {BATCHES[figure.model]}"
    return compare(scenario, what, figure.unit, ours, other, theirs, aim, headline=aim is not None)


def _panels(scenario: str, loads: Mapping[int, Loads], floor: str) -> list[Panel]:
    panels = []
    for figure in (P50, UNBATCHED, BATCHED) if floor == BARE else (UNBATCHED, BATCHED):
        here = loads[figure.clients]
        keys = {OURS: _key(OURS, figure.model), TORCHSERVE: _key(TORCHSERVE, figure.model), floor: floor}
        samples = {name: pick(here, key, figure.attribute) for name, key in keys.items()}
        plural = "s" if figure.clients > 1 else ""
        title = f"{scenario}: {figure.what}, {figure.clients} client{plural}, batchSize {BATCHES[figure.model]}"
        panels.append(Panel.of(title, figure.unit, samples))
    return panels
