"""Bodies from 64 KiB to 16 MiB to 1, 2 and 8 ranks, for one client; answers are small. A copy of 16 MiB takes turns, too.

Handlers get a bytearray of their own, which is a copy on every rank; 16 MiB also as a view, which is none. What only reads
16 MiB from its socket takes turns, too: over this machine's TCP no server can be faster.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests.benchmarks.contest import OURS, Load, pick, take_turns
from tests.benchmarks.peers.starting import BARE, RECEIVER, receiver
from tests.benchmarks.peers.torchserve import TORCHSERVE
from tests.benchmarks.plot import Panel
from tests.benchmarks.report import Aim, Findings, compare
from tests.benchmarks.workspace import HANDLERS, Model

if TYPE_CHECKING:
    from tests.benchmarks.contest import Contestant, Loads
    from tests.benchmarks.report import Row
    from tests.benchmarks.run import Run

SCENARIO = "bodies"
LARGE = 16 * 2**20
RANKS = (1, 2, 8)
MEMCPY = "a memcpy"
VIEW, VIEWS = "minserve:\n  bodies: view\n", (1, 8)  # what is set, and for groups of how many ranks


class Memcpy:
    """The contestant that copies 16 MiB from one place in memory to another, both in use before."""

    name = MEMCPY

    def __init__(self) -> None:
        self._source = bytes(b"x" * LARGE)
        self._target = bytearray(LARGE)

    def check(self) -> None:
        """Its pages are there."""
        self._target[:] = self._source

    def turn(self, seconds: int) -> Load:
        """The median of a tenth of a second: it varies little."""
        target, taken = memoryview(self._target), []
        until = time.perf_counter() + seconds / 10
        while (began := time.perf_counter()) < until:
            target[:] = self._source
            taken.append(1e6 * (time.perf_counter() - began))
        taken.sort()
        median = taken[len(taken) // 2]
        return Load(1e6 / median, median, taken[-1])


def measure(run: Run) -> Findings:
    """Every size in turn, all servers up."""
    length = (HANDLERS / "length.py",)
    models = {ranks: Model(f"length-{ranks}", length, ranks=ranks) for ranks in RANKS}
    views = {ranks: Model(f"view-{ranks}", length, ranks=ranks, more=VIEW) for ranks in VIEWS}
    with ExitStack() as stack:
        ours = stack.enter_context(run.server(OURS, [*models.values(), *views.values()]))
        theirs = None
        with run.forgive(TORCHSERVE):
            theirs = stack.enter_context(run.server(TORCHSERVE, [models[2]]))
        bare = run.bare(stack)
        floor = stack.enter_context(receiver(run.workspace))
        found: dict[int, Loads] = {}
        for size in sorted((*run.plan.sizes, LARGE)):
            answer = str(size).encode()
            contestants: dict[str, Contestant] = {
                str(ranks): run.clients(ours, model.name, 1, size, answer) for ranks, model in models.items()
            }
            contestants[BARE] = run.clients(bare, "length", 1, size, answer)
            if theirs is not None:
                contestants[TORCHSERVE] = run.clients(theirs, models[2].name, 1, size, answer)
            if size == LARGE:
                for ranks, model in views.items():
                    contestants[_view(ranks)] = run.clients(ours, model.name, 1, size, answer)
                contestants[RECEIVER] = run.clients(floor, "", 1, size, answer)
                contestants[MEMCPY] = Memcpy()
            found[size] = take_turns(run, f"bodies of {_size(size)}", contestants)
    rows = [row for size, loads in found.items() for row in _rows(size, loads)]
    ours_by_ranks = [*map(str, RANKS), *map(_view, VIEWS)]
    large = {
        **{f"minserve, {key}": key for key in ours_by_ranks},
        TORCHSERVE: TORCHSERVE,
        BARE: BARE,
        RECEIVER: RECEIVER,
    }
    samples = {name: _ms(found[LARGE], key) for name, key in large.items()}
    return Findings(rows, [Panel.of("bodies: p50 of 16 MiB, 1 client, by ranks", "ms", samples)])


def _rows(size: int, loads: Loads) -> list[Row]:
    def row(ours: str, what: str, other: str, key: str, aim: Aim | None = None, *, headline: bool = False) -> Row:
        named = f"p50, {_size(size)}, {what}"
        return compare(SCENARIO, named, "ms", _ms(loads, ours), other, _ms(loads, key), aim, headline=headline)

    rows = [row("8", "8 ranks", "1 rank", "1"), row("2", "2 ranks", TORCHSERVE, TORCHSERVE)]
    rows.append(row("2", "2 ranks", BARE, BARE))
    if size == LARGE:
        ours, what = _view(8), "8 ranks, a view"
        rows.append(row(ours, what, "1 rank, a view", _view(1), Aim("≤", 1.3), headline=True))
        rows.append(row(ours, what, MEMCPY, MEMCPY, Aim("≤", 3)))
        rows.append(row(ours, what, RECEIVER, RECEIVER))
        rows.append(row(ours, what, BARE, BARE))
    return rows


def _view(ranks: int) -> str:
    return f"{ranks}, a view"


def _ms(loads: Loads, key: str) -> list[float]:
    return [value / 1000 for value in pick(loads, key, "p50_us")]


def _size(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"
