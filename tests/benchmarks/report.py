"""Samples in, a markdown table out."""

from __future__ import annotations

import os
import platform
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.benchmarks.plan import Plan
    from tests.benchmarks.plot import Panel

HEADER = ("scenario", "measured", "minserve", "against", "ratio (lowest, highest round)", "aim", "")
MET, MISSED = "met", "missed"


@dataclass(frozen=True, slots=True)
class Aim:
    """A limit that the project has set itself.

    Attributes:
        sign: ≤, < or ≥.
        limit: of the ratio, or with a unit of the value.
    """

    sign: str
    limit: float
    unit: str = ""

    def met(self, value: float) -> bool:
        """Whether a value keeps to it."""
        return {"≤": value <= self.limit, "<": value < self.limit, "≥": value >= self.limit}[self.sign]

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:.3g}{self.unit}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        cells: what is measured, minserve's value, the other's, the ratio, the aim, whether it is met.
        headline: shown in the README, too.
    """

    scenario: str
    cells: tuple[str, ...]
    headline: bool = False


@dataclass(frozen=True, slots=True)
class Findings:
    """What a scenario has found: its rows, its panels of the plot, and what must be said below the table."""

    rows: Sequence[Row]
    panels: Sequence[Panel] = ()
    footnotes: Sequence[str] = ()


def compare(
    scenario: str,
    what: str,
    unit: str,
    ours: Sequence[float],
    name: str,
    theirs: Sequence[float],
    aim: Aim | None = None,
    headline: bool = False,
) -> Row:
    """A row of two things measured in turns: the medians of both, and the median of the rounds' ratios.

    Each ratio is of one round, in which the machine was the same for both. Without samples of a peer the row says so.
    """
    mine = _with_unit(statistics.median(ours), unit)
    if not theirs:
        return Row(scenario, (what, mine, f"{name}: not measured", "", str(aim or ""), ""), headline)
    ratios = [one / other for one, other in zip(ours, theirs, strict=True) if other]
    ratio = statistics.median(ratios) if ratios else 0.0
    spread = f"{_ratio(ratio)} ({_ratio(min(ratios))}, {_ratio(max(ratios))})" if ratios else ""
    other = f"{name} {_with_unit(statistics.median(theirs), unit)}"
    return Row(scenario, (what, mine, other, spread, *_verdict(ratio, aim)), headline)


def absolute(
    scenario: str,
    what: str,
    unit: str,
    values: Sequence[float],
    aim: Aim | None = None,
    headline: bool = False,
    other: str = "",
) -> Row:
    """A row of one thing alone: the median, and perhaps what to read beside it."""
    value = statistics.median(values)
    return Row(scenario, (what, _with_unit(value, unit), other, "", *_verdict(value, aim)), headline)


def failure(scenario: str, error: BaseException) -> Row:
    """A row for a scenario that came to nothing."""
    first = (str(error).splitlines() or [""])[0].replace("|", "/")
    return Row(scenario, (f"**failed**: {type(error).__name__}: {first}", "", "", "", "", "failed"), headline=True)


def _verdict(value: float, aim: Aim | None) -> tuple[str, str]:
    return ("", "") if aim is None else (str(aim), MET if aim.met(value) else MISSED)


def _with_unit(value: float, unit: str) -> str:
    return f"{number(value)} {unit}".strip()


def _ratio(value: float) -> str:
    return f"{value:.2g}" if value < 0.1 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def number(value: float) -> str:
    """Three digits: the noise leaves no more."""
    return f"{value:,.0f}" if value >= 100 or value < 1e-9 else f"{value:.3g}"


def table(rows: Iterable[Row]) -> str:
    """The whole table."""
    lines = [HEADER, ("---",) * len(HEADER), *((row.scenario, *row.cells) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe_machine(plan: Plan) -> str:
    """Where and how the table came about. The load average tells whether the machine had other work."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("minserve", "torch", "aiohttp", "uvloop"))
    load = os.getloadavg()[0]
    return (
        f"{time.strftime('%Y-%m-%d')}, {psutil.cpu_count()} cores ({_processor()}), load average before {load:.1f}, "
        f"Python {platform.python_version()}, {versions}; load from {plan.generator} on the same machine, "
        f"rounds of {plan.seconds} s, {plan.rounds} of them."
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
