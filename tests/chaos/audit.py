"""What the server holds on to: memory, descriptors, threads, processes, files. Counted before the faults and after."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.scene import NotReadyError, Scene

MORE_FDS = 4  # a connection of a client that has just left, a pipe on its way out
MORE_THREADS = 2
MORE_RSS = 64 * 2**20  # bytes; the soak measures finer
SETTLE_S = 10.0


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process holds. `rss` in bytes."""

    rss: int
    fds: int
    threads: int

    def __str__(self) -> str:
        return f"{self.rss / 2**20:.0f} MB, {self.fds} fds, {self.threads} threads"


def holdings(pid: int) -> Holdings:
    """Of a process that runs."""
    process = psutil.Process(pid)
    return Holdings(process.memory_info().rss, process.num_fds(), process.num_threads())


@dataclass(frozen=True, slots=True)
class Baseline:
    """What there was before the first fault. `files`: how many, sockets and shared memory among them."""

    held: Holdings
    files: int

    def __str__(self) -> str:
        return f"{self.held}, {self.files} files and sockets"


async def settled(scene: Scene) -> Baseline:
    """What the server holds once it has noticed which clients have hung up."""
    found = [holdings(scene.server.pid)]
    for _ in range(10):
        await asyncio.sleep(0.05)
        found.append(holdings(scene.server.pid))
    return Baseline(min(found, key=lambda one: one.fds), len(scene.server.files()))


async def audit(scene: Scene, baseline: Baseline) -> Holdings:
    """While nothing is asked: every worker READY, only the due processes and files there, and no more held than before."""
    server, ledger = scene.server, scene.ledger
    agents: set[int] = set()
    for model in server.models:
        facts = await scene.watch(model, lambda facts: facts.state == "READY" and facts.workers == 1, SETTLE_S)
        if facts is None:
            ledger.breach("audit", model.name, f"not one READY worker: {await scene.facts(model)}")
            continue
        agents.add(facts.agent)

    def no_more_fds() -> bool:
        return holdings(server.pid).fds <= baseline.held.fds + MORE_FDS

    def no_more_files() -> bool:
        return len(server.files()) <= baseline.files

    await settles(
        scene, lambda: not server.strangers(agents), lambda: f"belong to no worker: {server.strangers(agents)}"
    )
    await settles(scene, lambda: not server.zombies(), lambda: f"zombies: {server.zombies()}")
    await settles(scene, no_more_fds, lambda: f"descriptors: {baseline.held.fds} → {_descriptors(server.pid)}")
    await settles(scene, no_more_files, lambda: f"files: {baseline.files} → {server.files()}")
    now = holdings(server.pid)
    if now.threads > baseline.held.threads + MORE_THREADS:
        ledger.breach("audit", "", f"threads: {baseline.held.threads} → {now.threads}")
    if now.rss > baseline.held.rss + MORE_RSS:
        ledger.breach("audit", "", f"memory: {baseline.held} → {now}")
    return now


async def settles(scene: Scene, settled: Callable[[], bool], what: Callable[[], str]) -> None:
    """Something that takes a moment must come to be; if it does not, `what` says what is wrong."""
    try:
        await scene.until(settled, SETTLE_S, "")
    except NotReadyError:
        scene.ledger.breach("audit", "", what())


def _descriptors(pid: int) -> str:
    """How many, and of what."""
    kinds: dict[str, int] = {}
    folder = Path(f"/proc/{pid}/fd")
    for entry in folder.iterdir():
        try:
            kind = os.readlink(entry).split(":")[0]
        except OSError:
            continue
        kinds[kind] = kinds.get(kind, 0) + 1
    return f"{sum(kinds.values())} {kinds}"
