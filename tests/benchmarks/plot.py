"""Bars as an SVG that is readable on light and on dark pages. By hand: it is a dozen rectangles."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Self

from tests.benchmarks.report import number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

COLUMNS = 2
WIDTH, GAP = 460, 28  # of a panel, between panels
LABEL, VALUE = 118, 84  # left and right of the bars
TITLE, BAR, STEP = 30, 14, 22
MARGIN = 16
# The colours are mid-tones, for either background; only the text changes with it.
OURS, OTHERS = "#0a9396", "#94a3b8"
STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #1f2328; }
.title { font-weight: 600; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } }
"""


@dataclass(frozen=True, slots=True)
class Panel:
    """A group of bars with a scale of their own, which begins at 0."""

    title: str
    unit: str
    bars: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, title: str, unit: str, samples: Mapping[str, Sequence[float]]) -> Self:
        """The medians; what has no samples has no bar."""
        return cls(title, unit, tuple((name, statistics.median(each)) for name, each in samples.items() if each))

    @property
    def height(self) -> int:
        """Of the whole panel."""
        return TITLE + STEP * len(self.bars)


def draw(panels: Sequence[Panel]) -> str:
    """The picture, panels in rows of two."""
    parts, top = [], MARGIN
    for first in range(0, len(panels), COLUMNS):
        row = panels[first : first + COLUMNS]
        for column, panel in enumerate(row):
            parts.append(_panel(panel, MARGIN + column * (WIDTH + GAP), top))
        top += max(panel.height for panel in row) + GAP
    width = 2 * MARGIN + COLUMNS * WIDTH + (COLUMNS - 1) * GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" role="img">',
            "<title>minserve beside other servers</title>",
            f"<style>\n{STYLE}</style>",
            *parts,
            "</svg>\n",
        ]
    )


def _panel(panel: Panel, left: int, top: int) -> str:
    largest = max((value for _, value in panel.bars), default=0.0) or 1.0
    lines = [f'<text class="title" x="{left}" y="{top + 12}">{escape(panel.title)}</text>']
    for index, (name, value) in enumerate(panel.bars):
        y = top + TITLE + STEP * index
        length = max(1.0, (WIDTH - LABEL - VALUE) * value / largest)
        colour = OURS if name.startswith("minserve") else OTHERS
        text = f"{number(value)} {panel.unit}".strip()
        lines += [
            f'<text x="{left}" y="{y + 11}">{escape(name)}</text>',
            f'<rect x="{left + LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2" fill="{colour}"/>',
            f'<text x="{left + LABEL + length + 6:.1f}" y="{y + 11}">{escape(text)}</text>',
        ]
    return "\n".join(lines)
