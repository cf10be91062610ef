"""Where a whole run is kept: docs/benchmarks.md with its plot, and the short table of the README, between markers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.report import MET, table
from tests.benchmarks.workspace import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.benchmarks.report import Row

PAGE = Path("docs/benchmarks.md")
PLOT = Path("docs/benchmarks.svg")
README = Path("README.md")
BEGIN = "<!-- written by `make bench` -->"
END = "<!-- end of what `make bench` writes -->"


def page(machine: str, rows: Sequence[Row], footnotes: Sequence[str], notes: Sequence[str]) -> str:
    """All of a run, as markdown.

    Args:
        notes: what was missing or has failed.
    """
    parts = [machine, table(rows), *footnotes]
    if notes:
        parts.append("\n".join(["Missing or failed:", "", *(f"- {_one_line(note)}" for note in notes)]))
    return "\n\n".join(parts)


def headlines(machine: str, rows: Sequence[Row], footnotes: Sequence[str]) -> str:
    """The rows that tell most, and where the rest is."""
    aims = [row.cells[-1] for row in rows if row.cells[-1]]
    told = f"{aims.count(MET)} of {len(aims)} aims are met. What each row is, and all the others: [{PAGE}]({PAGE})."
    return "\n\n".join([f"{machine} {told}", table([row for row in rows if row.headline]), *footnotes])


def publish(whole: str, short: str, picture: str, root: Path = REPOSITORY) -> None:
    """Writes the page, the README and the plot.

    Raises:
        ValueError: a file has not both markers; nothing is written then.
    """
    pieces = {PAGE: f"![bars of the figures below]({PLOT.name})\n\n{whole}", README: short}
    texts = {file: replace((root / file).read_text(), piece) for file, piece in pieces.items()}
    for file, text in {**texts, PLOT: picture}.items():
        (root / file).write_text(text)


def replace(text: str, piece: str) -> str:
    """The text with another piece between the markers.

    Raises:
        ValueError: they are not there, in this order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there must be {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n\n{piece}\n\n{end}{after}"


def _one_line(note: str) -> str:
    return " / ".join(line.strip() for line in note.splitlines()[:3] if line.strip())
