"""Runs a server for long and measures whether it grows: `python -m tests.chaos.soak --requests 100000 --restarts 100`.

First the requests (good ones, handler errors, clients that leave, deadlines that pass, streams), then the restarts. Memory,
descriptors, threads and shared memory of the server and its ranks are sampled all along, each time with nothing under way;
what counts is the median of the last samples against that of those behind the warm-up. Ends in 1 if anything has grown.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import report
from tests.chaos.audit import Holdings, holdings, settles
from tests.chaos.catalogue import FULL, Model
from tests.chaos.client import Client
from tests.chaos.faults import BY, IN_STEP, VAGUE
from tests.chaos.ledger import Ledger
from tests.chaos.scene import READY_S, Scene, fill
from tests.chaos.server import ChaosServer

MODELS = tuple(model for model in FULL if model.name in ("plain", "tp2", "stream2"))
CLIENTS = 24
WARM_UP = 0.2  # share of the requests or restarts that comes before the first sample that counts
SAMPLES = 25  # of each part
COMPARED = 5  # samples on either side
GROWTH_RSS = {
    "server": 8 * 2**20,
    "rank": 6 * 2**20,
}  # bytes, over the whole of a part: 100 bytes a request would be 10 MB
GROWTH_FDS = 3
GROWTH_THREADS = 1
CHEAP_RESTARTS = 0.9  # share of the restarts that are a process without torch


@dataclass(frozen=True)
class Sample:
    """What was held at one time, by "server" and by "model rank n". `files`: in the runtime folder and /dev/shm."""

    held: dict[str, Holdings]
    files: int


class Soak:
    """One soak of one server."""

    def __init__(self, scene: Scene, tell: Callable[[str], None]) -> None:
        self.scene = scene
        self.tell = tell
        self.samples: list[Sample] = []

    # ── requests ──

    async def requests(self, count: int) -> None:
        """So many, a few dozen at a time, with a pause for each sample."""
        left = iter(range(count))
        per_sample = max(1, count // SAMPLES)
        for number in range(SAMPLES):
            share = [next(left, None) for _ in range(per_sample)]
            todo = iter([one for one in share if one is not None])
            await asyncio.gather(*(self._client(todo) for _ in range(CLIENTS)))
            await self._sample(ranks=True)
            if not number % 5:
                self.tell(f"{(number + 1) * per_sample} requests: {self.samples[-1].held['server']}")

    async def _client(self, todo: Iterable[int]) -> None:
        for _ in todo:
            await self._one()

    async def _one(self) -> None:
        rng, client = self.scene.rng, self.scene.client
        chance = rng.random()
        model = self._model("plain" if chance < 0.45 else "tp2" if chance < 0.97 else "stream2")
        kind = rng.random()
        if kind < (0.95 if model.streams else 0.90):
            await client.ask(model)
        elif kind < 0.94:
            order = {"do": "raise", "ranks": list(range(model.ranks)), "moment": "before", "at": 0.0}
            await client.ask(model, {"fault": order})
        elif kind < 0.97:
            await client.ask(model, {"work": 0.01}, deadline_s=0.005)
        else:
            await self._leaves(model)

    async def _leaves(self, model: Model) -> None:
        asked = asyncio.ensure_future(self.scene.client.ask(model))
        await asyncio.sleep(self.scene.rng.uniform(0.0, 0.01))
        asked.cancel()
        with suppress(asyncio.CancelledError):
            await asked

    # ── restarts ──

    async def restarts(self, count: int) -> None:
        """So many, by SIGKILL of a rank, under some load."""
        cheap = [self._model("plain")] * round(count * CHEAP_RESTARTS)
        dear = [self._model("tp2"), self._model("stream2")] * count
        models = [*cheap, *dear[: count - len(cheap)]]
        self.scene.rng.shuffle(models)
        every = max(1, count // SAMPLES)
        for number, model in enumerate(models, 1):
            await self._restart(model)
            if not number % every:
                await self._sample(ranks=False)
            if not number % (5 * every):
                self.tell(f"{number} restarts: {self.samples[-1].held['server']}")

    async def _restart(self, model: Model) -> None:
        before = await self.scene.healthy(model)
        rank = self.scene.rng.randrange(model.ranks)
        says = fill(f"{BY}.*(SIGKILL|{VAGUE})", model, f"rank {rank}", rank, before.ranks[rank])
        row = self.scene.ledger.row("restarts")
        row.count += 1
        with self.scene.ledger.window(model.name, row, frozenset({503}), says, breaks_streams=True):
            asked = [asyncio.ensure_future(self.scene.client.ask(model, {"pace": 0.01, "work": 0.1})) for _ in range(3)]
            await asyncio.sleep(0.05)
            os.kill(before.ranks[rank], signal.SIGKILL)
            await asyncio.gather(*asked)
            again = await self.scene.watch(
                model, lambda facts: facts.serving and facts.restarts > before.restarts, READY_S
            )
            if again is None:
                self.scene.ledger.breach("restarts", model.name, f"not READY again: {await self.scene.facts(model)}")

    # ── measuring ──

    def _model(self, name: str) -> Model:
        return next(model for model in self.scene.server.models if model.name == name)

    async def _sample(self, *, ranks: bool) -> None:
        """With no connection and no batch under way, so that only what stays is counted."""
        server, scene = self.scene.server, self.scene
        await scene.client.call_again()
        held: dict[str, Holdings] = {}
        for model in server.models:
            facts = await scene.watch(model, lambda facts: facts.state == "READY" and not facts.pending, READY_S)
            if facts is None:
                scene.ledger.breach("soak", model.name, f"not idle: {await scene.facts(model)}")
                return
            if ranks:
                held |= {f"{model.name} rank {rank}": holdings(pid) for rank, pid in enumerate(facts.ranks)}
        await scene.client.call_again()
        await asyncio.sleep(0.1)  # the server reads that the connections have ended
        held["server"] = holdings(server.pid)
        self.samples.append(Sample(held, len(server.files())))

    def grown(self, part: str) -> str:
        """A table of this part's samples, with a breach for each thing that has grown; begins anew."""
        samples, self.samples = self.samples, []
        samples = samples[int(len(samples) * WARM_UP) :]
        if len(samples) < 2 * COMPARED:
            return f"{part}: too short to compare"
        first, last = samples[:COMPARED], samples[-COMPARED:]
        lines = [f"| {part} | memory | fds | threads |", "|---|---|---|---|"]
        for name in first[0].held:
            cells = []
            for what, unit, bound in (
                ("rss", 2**20, GROWTH_RSS["server" if name == "server" else "rank"]),
                ("fds", 1, GROWTH_FDS),
                ("threads", 1, GROWTH_THREADS),
            ):
                before, after = (
                    statistics.median(getattr(one.held[name], what) for one in some) for some in (first, last)
                )
                cells.append(f"{before / unit:.1f} → {after / unit:.1f}{' MB' if unit > 1 else ''}")
                if after - before > bound:
                    self.scene.ledger.breach(
                        part, name, f"{what} has grown: {cells[-1]}, at most {bound / unit:g} more"
                    )
            lines.append(f"| {name} | {' | '.join(cells)} |")
        before_files, after_files = (statistics.median(one.files for one in some) for some in (first, last))
        lines.append(f"files and shared memory: {before_files:g} → {after_files:g}")
        if after_files > before_files:
            self.scene.ledger.breach(part, "", f"files left behind: {lines[-1]}")
        return "\n".join(lines)


async def soak(
    seed: int, requests: int, restarts: int, tolerance_s: float = 0.0, tell: Callable[[str], None] = print
) -> tuple[Ledger, str]:
    """Both parts; what was found, and the tables."""
    ledger, server, rng = Ledger(), ChaosServer(MODELS), random.Random(seed)
    try:
        async with Client(server, ledger, rng, 1.0 + tolerance_s) as client:
            scene = Scene(server, client, ledger, rng, tolerance_s)
            server.start()
            for model in MODELS:
                await scene.watch(model, lambda facts: facts.serving, READY_S)
                await scene.healthy(model)
            work, began, row = Soak(scene, tell), time.monotonic(), ledger.row("requests")
            tables = []
            if requests:
                with ExitStack() as stack:
                    for model in MODELS:
                        for status, says in ((503, IN_STEP + "told to fail"), (504, "{model}.*deadline")):
                            pattern = fill(says, model, "", 0, 0)
                            stack.enter_context(ledger.window(model.name, row, frozenset({status}), pattern))
                    await work.requests(requests)
                tables.append(work.grown(f"{requests} requests, {requests / (time.monotonic() - began):.0f}/s"))
            if restarts:
                await work.restarts(restarts)
                tables.append(work.grown(f"{restarts} restarts"))
            await settles(scene, lambda: not server.zombies(), lambda: f"zombies: {server.zombies()}")
            server.processes()
            server.terminate()
            await scene.until(lambda: server.exit_code is not None, 30.0, "the end of the server")
            if left := server.wait_until_alone(5.0):
                ledger.breach("soak", "", f"processes left: {left}")
            if files := server.files():
                ledger.breach("soak", "", f"files left: {files}")
            return ledger, "\n\n".join([*tables, report.table(ledger)])
    finally:
        server.clean_up()


def main() -> int:
    """Runs, reports; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000, metavar="N", help="%(default)s")
    parser.add_argument("--restarts", type=int, default=100, metavar="N", help="%(default)s")
    parser.add_argument("--seed", type=int, default=None, help="of a run that is to be repeated")
    parser.add_argument("--report", type=Path, help="write the tables to this file, too")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    for number in (signal.SIGTERM, signal.SIGHUP):  # through the `finally`, as Ctrl-C does it
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    head = f"soak, seed {seed}; {report.machine()}"
    print(head, flush=True)
    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    ledger, tables = asyncio.run(soak(seed, arguments.requests, arguments.restarts, tell=tell))
    text = f"{head}, {time.monotonic() - began:.0f} s\n\n{tables}\n"
    if ledger.breaches:
        text += f"\n{len(ledger.breaches)} breaches\n\n{report.breaches(ledger.breaches)}\n"
    print(f"\n{text}")
    if arguments.report:
        arguments.report.write_text(text)
    return 1 if ledger.breaches else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
