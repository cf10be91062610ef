"""Contestants take turns: the first, the second, the first again, so that a slow minute slows all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import psutil

from tests.benchmarks.programs import ProgramError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tests.benchmarks.run import Run

OURS = "minserve"


class LoadError(ProgramError):
    """A request failed: what was measured is not what was meant."""


@dataclass(frozen=True, slots=True)
class Load:
    """What was seen of one contestant in one round.

    Attributes:
        server_cpu_us, ranks_cpu_us: CPU for a request, of the server's own process and of all that it has started.
    """

    requests_per_s: float
    p50_us: float
    p99_us: float
    server_cpu_us: float = 0.0
    ranks_cpu_us: float = 0.0


class Contestant(Protocol):
    """Something that can be measured again and again."""

    @property
    def name(self) -> str:
        """As in the table."""

    def check(self) -> None:
        """Sees once that it does what is measured. Raises LoadError."""

    def turn(self, seconds: int) -> Load:
        """One measurement. Raises LoadError."""


Loads = dict[str, list[Load]]


def take_turns(run: Run, what: str, contestants: Mapping[str, Contestant]) -> Loads:
    """Measures each contestant, one after the other, as often as the plan says.

    A peer that fails is left out from then on and named in the run's notes.

    Args:
        what: for the progress: the load.
        contestants: by the keys of the result.

    Returns:
        One `Load` a round for each that has finished.

    Raises:
        LoadError: a request to minserve failed.
    """
    plan = run.plan
    loads: Loads = {}
    for key, contestant in contestants.items():
        with run.forgive(contestant.name, f"{what}, {key}"):
            contestant.check()
            if plan.warm_up_s:
                contestant.turn(plan.warm_up_s)
            loads[key] = []
    for number in range(1, plan.rounds + 1):
        for key, rounds in loads.items():
            with run.forgive(contestants[key].name, f"{what}, {key}"):
                load = contestants[key].turn(plan.seconds)
                rounds.append(load)
                plan.tell(
                    f"{what}, round {number} of {plan.rounds}, {key}: "
                    f"{load.requests_per_s:.0f} /s, p50 {load.p50_us:.0f} µs, p99 {load.p99_us:.0f} µs"
                )
        loads = {key: rounds for key, rounds in loads.items() if len(rounds) == number}
    return loads


def pick(loads: Mapping[str, Sequence[Load]], key: str, attribute: str) -> list[float]:
    """One figure of each round; empty for a contestant that is not there."""
    return [getattr(load, attribute) for load in loads.get(key, ())]


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time of these processes, from /proc/<pid>/stat. The kernel counts in ticks of 10 ms."""
    total = 0.0
    for pid in pids:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:  # it has just ended
            continue
        total += times.user + times.system
    return total
