"""The documents name files that exist, and docs/architecture.md every file of the packages whose files it lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))


@pytest.mark.parametrize("package", re.findall(r"^\| file in `(\w+)/` \|", ARCHITECTURE, re.MULTILINE))
def test_every_file_of_a_package_is_in_its_table(package: str) -> None:
    table = ARCHITECTURE.partition(f"| file in `{package}/` |")[2].partition("\n\n")[0]
    files = {path.name for path in (ROOT / "minserve" / package).glob("*.py") if not path.name.startswith("__")}
    assert sorted(re.findall(r"`(\w+\.py)`", table)) == sorted(files)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_and_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    text = path.read_text()
    named = re.findall(r"`([\w.-]+/[\w./-]+\.py)`", text)
    lost = [name for name in named if not any((ROOT / top / name).is_file() for top in ("", "minserve", "store"))]
    linked = re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", text)
    assert lost + [link for link in linked if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_a_heading_find_it(document: str) -> None:
    path = ROOT / document
    for target, heading in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", path.read_text()):
        headings = re.findall(r"^#+ (.+)$", (path.parent / target if target else path).read_text(), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}
        assert heading in slugs, f"{target}#{heading}"
