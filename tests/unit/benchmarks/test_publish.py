"""What a run writes, and where."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.benchmarks.plot import Panel, draw
from tests.benchmarks.publish import BEGIN, END, PAGE, PLOT, README, headlines, page, publish, replace
from tests.benchmarks.report import compare
from tests.benchmarks.workspace import REPOSITORY

ROWS = [
    compare("s", "told everywhere", "", [1], "o", [2], headline=True),
    compare("s", "told on the page", "", [1], "o", [2]),
]


@pytest.mark.parametrize("file", [PAGE, README])
def test_the_documents_have_the_markers(file: Path) -> None:
    text = (REPOSITORY / file).read_text()
    assert replace(replace(text, "new"), "new") == replace(text, "new")
    assert text.count(BEGIN) == text.count(END) == 1


def test_a_run_is_kept_between_the_markers(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for file in (PAGE, README):
        (tmp_path / file).write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    whole = page("a machine", ROWS, ["a footnote"], ["mosec: not chosen"])
    publish(whole, headlines("a machine", ROWS, ["a footnote"]), "a picture", tmp_path)
    whole, short = ((tmp_path / file).read_text() for file in (PAGE, README))
    for text in (whole, short):
        assert text.startswith(f"before\n{BEGIN}\n\n")
        assert text.endswith(f"\n\n{END}\nafter\n")
        assert "told everywhere" in text
        assert "a machine" in text
        assert "a footnote" in text
        assert "old" not in text.replace("told", "")
    assert "told on the page" in whole
    assert "- mosec: not chosen" in whole
    assert "told on the page" not in short
    assert (tmp_path / PLOT).read_text() == "a picture"


def test_a_document_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="there must be"):
        replace(f"{END} {BEGIN}", "new")


def test_the_longest_bar_is_the_largest_figure() -> None:
    panel = Panel.of("a <title> & more", "ms", {"minserve": [1.0, 3.0, 2.0], "other": [4.0], "absent": []})
    picture = ET.fromstring(draw([panel, panel, panel]))
    widths = [float(bar.attrib["width"]) for bar in picture.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(widths) == 6
    assert widths[0] == pytest.approx(widths[1] / 2, abs=0.1)
