"""Requests over HTTP: the echo handler on ranks against the bare application, all servers up at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.benchmarks.load import take_turns
from tests.benchmarks.programs import start_bare, start_minserve, wait_for_inference
from tests.benchmarks.report import Aim, compare
from tests.benchmarks.workspace import ECHO_HANDLER

if TYPE_CHECKING:
    from tests.benchmarks.load import Load
    from tests.benchmarks.plan import Plan
    from tests.benchmarks.report import Row
    from tests.benchmarks.workspace import Workspace

BARE = "bare"
ONE_BY_ONE = "one-by-one"
BATCHED = "batched"
BATCHED_8 = "batched-8"  # ranks
MODELS = {ONE_BY_ONE: (2, 1), BATCHED: (2, 32), BATCHED_8: (8, 32)}  # ranks, batchSize
BATCHED_CLIENTS = (16, 64)


@dataclass(frozen=True, slots=True)
class Servers:
    """What is up: the pid of the minserve process, and the URLs of all models and of the bare application by name."""

    pid: int
    urls: dict[str, str]


@contextlib.contextmanager
def servers(workspace: Workspace) -> Iterator[Servers]:
    """Starts a minserve with every model, and the bare application; ends them."""
    stores = {
        workspace.add_model("echo", name, ECHO_HANDLER, ranks=ranks, batch_size=batch_size)
        for name, (ranks, batch_size) in MODELS.items()
    }
    with start_minserve(workspace, "minserve-echo", stores.pop()) as minserve, start_bare(workspace) as bare:
        bases = {BARE: bare.wait_for("^http.*")[0], **dict.fromkeys(MODELS, wait_for_inference(minserve))}
        yield Servers(minserve.pid, {name: f"{base}/predictions/{name}" for name, base in bases.items()})


def measure(plan: Plan, up: Servers) -> list[Row]:
    """Latency at one client, then requests a second one by one and batched."""

    def load(clients: int, *names: str) -> dict[str, list[Load]]:
        urls = {name: up.urls[name] for name in names}
        return take_turns(plan.generator, urls, clients, plan.rounds, plan.seconds, plan.tell)

    at_1 = load(1, ONE_BY_ONE, BARE)
    at = {16: load(16, ONE_BY_ONE, BATCHED, BATCHED_8, BARE), 64: load(64, BATCHED, BATCHED_8, BARE)}
    return [
        _latency("p50", at_1, lambda load: load.p50_us, Aim("≤", 1.8)),
        _latency("p99", at_1, lambda load: load.p99_us),
        _throughput(16, "batchSize 1, 2 ranks", at[16], ONE_BY_ONE, BARE, Aim("≥", 0.45)),
        *(
            _throughput(clients, "batchSize 32, 2 ranks", at[clients], BATCHED, BARE, Aim("≥", 0.85))
            for clients in BATCHED_CLIENTS
        ),
        *(
            _throughput(clients, "batchSize 32, 8 ranks", at[clients], BATCHED_8, BATCHED, Aim("≥", 0.8))
            for clients in BATCHED_CLIENTS
        ),
    ]


def _latency(name: str, loads: dict[str, list[Load]], read: Callable[[Load], float], aim: Aim | None = None) -> Row:
    ours, theirs = ([read(load) for load in loads[key]] for key in (ONE_BY_ONE, BARE))
    return compare(f"{name}, 1 client, batchSize 1, 2 ranks", "µs", ours, "bare", theirs, aim)


def _throughput(clients: int, what: str, loads: dict[str, list[Load]], ours: str, theirs: str, aim: Aim) -> Row:
    name = "bare" if theirs == BARE else "2 ranks"
    return compare(
        f"requests/s, {clients} clients, {what}",
        "/s",
        [load.requests_per_s for load in loads[ours]],
        name,
        [load.requests_per_s for load in loads[theirs]],
        aim,
    )
