"""How much is measured. A quick run has the same scenarios, fewer points in each, and noisier figures."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """One run.

    Attributes:
        generator: what puts the closed-loop load.
        rounds, seconds: how often each contestant gets each load, and for how long.
        warm_up_s: load before the first round; 0: none.
        idle_s: how long the idle server is watched.
        starts: how often each start and each recovery is timed.
        ranks: sizes of groups beside 2, which is in every scenario.
        sizes: bytes of bodies beside 16 MiB.
    """

    generator: str
    rounds: int
    seconds: int
    warm_up_s: int
    idle_s: float
    starts: int
    ranks: tuple[int, ...]
    sizes: tuple[int, ...]

    def tell(self, line: str) -> None:
        """Progress, apart from the table on stdout."""
        print(line, file=sys.stderr, flush=True)


def full(generator: str) -> Plan:
    """Half an hour with all peers, once their environments are there. Rounds are short, so noise spoils few of them."""
    return Plan(
        generator, rounds=9, seconds=1, warm_up_s=1, idle_s=3.0, starts=4, ranks=(1, 4, 8), sizes=(64 * 2**10, 2**20)
    )


def quick(generator: str) -> Plan:
    """A few minutes without peers."""
    return Plan(generator, rounds=1, seconds=1, warm_up_s=0, idle_s=1.0, starts=1, ranks=(8,), sizes=(2**20,))
