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
    from collections.abc import Sequence

HEADER = ("measured", "minserve", "against", "ratio (lowest, highest round)", "aim", "")


@dataclass(frozen=True, slots=True)
class Aim:
    """A limit that the project has set itself."""

    sign: str  # ≤, < or ≥
    limit: float
    unit: str = ""

    def met(self, value: float) -> bool:
        """Whether a value keeps to it."""
        return {"≤": value <= self.limit, "<": value < self.limit, "≥": value >= self.limit}[self.sign]

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}{self.unit}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    cells: tuple[str, ...]

    def __str__(self) -> str:
        return f"| {' | '.join(self.cells)} |"


def compare(
    what: str, unit: str, ours: Sequence[float], name: str, theirs: Sequence[float], aim: Aim | None = None
) -> Row:
    """A row of two things measured in turns: the medians of both, and the median of the rounds' ratios.

    Each ratio is of one round, in which the machine was the same for both.
    """
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    spread = f"{ratio:.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
    other = f"{name} {_number(statistics.median(theirs))} {unit}"
    return Row((what, f"{_number(statistics.median(ours))} {unit}", other, spread, *_verdict(ratio, aim)))


def absolute(what: str, value: float, unit: str, aim: Aim) -> Row:
    """A row of one thing alone."""
    return Row((what, f"{_number(value)} {unit}", "", "", *_verdict(value, aim)))


def _verdict(value: float, aim: Aim | None) -> tuple[str, str]:
    return ("", "") if aim is None else (str(aim), "met" if aim.met(value) else "missed")


def _number(value: float) -> str:
    """Three digits: the noise leaves no more."""
    return f"{value:.0f}" if value >= 100 or value < 1e-9 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """The whole table."""
    return "\n".join(map(str, [Row(HEADER), Row(("---",) * len(HEADER)), *rows]))


def describe_machine(generator: str, rounds: int, seconds: int) -> str:
    """Where and how the table came about. The load average tells whether the machine had other work."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "aiohttp", "uvloop"))
    load = os.getloadavg()[0]
    return (
        f"{time.strftime('%Y-%m-%d')}, {psutil.cpu_count()} cores ({platform.machine()}), load average before {load:.1f}, "
        f"Python {platform.python_version()}, {versions}; load from {generator}, {rounds} rounds of {seconds} s."
    )
