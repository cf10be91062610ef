"""How much is measured. The figures of a quick run are noisier, the scenarios are the same."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """One run.

    Attributes:
        rounds, seconds: how often each server gets each load, and for how long.
        idle_seconds: how long the idle server is watched.
        starts: how often each start is timed.
    """

    generator: str
    rounds: int
    seconds: int
    idle_seconds: float
    starts: int

    def tell(self, line: str) -> None:
        """Progress, apart from the table on stdout."""
        print(line, file=sys.stderr, flush=True)


def full(generator: str) -> Plan:
    """Under five minutes."""
    return Plan(generator, rounds=7, seconds=3, idle_seconds=5.0, starts=5)


def quick(generator: str) -> Plan:
    """About a minute."""
    return Plan(generator, rounds=2, seconds=1, idle_seconds=5.0, starts=1)
