"""The table of a run, and what broke its rules."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence

from tests.chaos.ledger import BETWEEN, Breach, Ledger, Row

HEAD = (
    "| fault | n | detected in (p50, max) | limit | over it | vague | recovered in (p50, max) | answered/asked | wrong |",
    "|---|---|---|---|---|---|---|---|---|",
)
LEGEND = (
    "Detected: from the fault to the error that its request got, or, without one, to what /models says. "
    "Over it: seen later than its limit. Vague: a death told without signal or code, which nobody could read in time. "
    "Answered: whatever it was, or the client itself has left; a wrong answer, or an error that was not due, is a breach."
)
SHOWN = 12  # breaches of one kind that are printed


def table(ledger: Ledger) -> str:
    """One line for each kind of fault, those that cost a restart first."""
    rows = sorted(ledger.rows.values(), key=lambda row: (row.name == BETWEEN, not row.restarts, row.name.lower()))
    total = Row("**all**")
    for row in rows:
        total.count += row.count
        total.over += row.over
        total.vague += row.vague
        total.limits |= row.limits
        total.asked += row.asked
        total.right += row.answered - row.wrong
        total.wrong += row.wrong
    lines = [_line(row) for row in rows]
    return "\n".join([*HEAD, *lines, _line(total, limit=""), "", LEGEND])


def _line(row: Row, limit: str | None = None) -> str:
    cells = (
        row.name,
        str(row.count or ""),
        _times(row.detected),
        _limit(row.limits) if limit is None else limit,
        str(row.over) if row.limits else "",
        str(row.vague or ""),
        _times(row.recovered),
        f"{row.answered}/{row.asked}",
        str(row.wrong),
    )
    return f"| {' | '.join(cells)} |"


def _limit(limits: set[float]) -> str:
    return " to ".join(f"{limit:g}" for limit in sorted({min(limits), max(limits)})) + " s" if limits else ""


def _times(values: Sequence[float]) -> str:
    return f"{_time(statistics.median(values))}, {_time(max(values))}" if values else ""


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def breaches(found: Sequence[Breach]) -> str:
    """All of them, by kind; the same thing again and again only so often."""
    by_kind: dict[str, list[Breach]] = {}
    for breach in found:
        by_kind.setdefault(breach.fault, []).append(breach)
    lines = []
    for kind, some in sorted(by_kind.items()):
        lines.append(f"{kind}: {len(some)}")
        lines += [f"  {breach.model}: {breach.text}" for breach in some[:SHOWN]]
        if len(some) > SHOWN:
            lines.append(f"  … and {len(some) - SHOWN} more")
    return "\n".join(lines)


def machine() -> str:
    """What it ran on."""
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, Linux {platform.release()}"
