"""Bodies from 64 KiB to 16 MiB to 1, 2 and 8 ranks, for one client; answers are small. A copy of 16 MiB takes turns, too."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests.benchmarks.contest import OURS, Load, pick, take_turns
from tests.benchmarks.peers.starting import BARE
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
    with ExitStack() as stack:
        ours = stack.enter_context(run.server(OURS, list(models.values())))
        theirs = None
        with run.forgive(TORCHSERVE):
            theirs = stack.enter_context(run.server(TORCHSERVE, [models[2]]))
        bare = run.bare(stack)
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
                contestants[MEMCPY] = Memcpy()
            found[size] = take_turns(run, f"bodies of {_size(size)}", contestants)
    rows = [row for size, loads in found.items() for row in _rows(size, loads)]
    large = {**{f"minserve, {ranks}": str(ranks) for ranks in RANKS}, TORCHSERVE: TORCHSERVE, BARE: BARE}
    samples = {name: _ms(found[LARGE], key) for name, key in large.items()}
    return Findings(rows, [Panel.of("bodies: p50 of 16 MiB, 1 client, by ranks", "ms", samples)])


def _rows(size: int, loads: Loads) -> list[Row]:
    what, large = f"p50, {_size(size)}", size == LARGE
    rows = [
        compare(SCENARIO, f"{what}, 8 ranks", "ms", _ms(loads, "8"), "1 rank", _ms(loads, "1"),
                Aim("≤", 1.3) if large else None, headline=large),
        compare(SCENARIO, f"{what}, 2 ranks", "ms", _ms(loads, "2"), TORCHSERVE, _ms(loads, TORCHSERVE)),
        compare(SCENARIO, f"{what}, 2 ranks", "ms", _ms(loads, "2"), BARE, _ms(loads, BARE)),
    ]  # fmt: skip
    if large:
        memcpy = _ms(loads, MEMCPY)
        rows.append(compare(SCENARIO, f"{what}, 8 ranks", "ms", _ms(loads, "8"), MEMCPY, memcpy, Aim("≤", 3)))
        rows.append(compare(SCENARIO, f"{what}, 8 ranks", "ms", _ms(loads, "8"), BARE, _ms(loads, BARE)))
    return rows


def _ms(loads: Loads, key: str) -> list[float]:
    return [value / 1000 for value in pick(loads, key, "p50_us")]


def _size(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"
