"""docs/configuration.md has a row for every option, and no row for any other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minserve.config.model import json_schema
from minserve.config.reference import server_options

TEXT = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
SCHEMA = json_schema()
SECTIONS = {"torchrun", "minserve"}


def rows(begin: str, end: str) -> set[str]:
    part = TEXT.partition(f"\n{begin}\n")[2].partition(f"\n{end}\n")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE))


def properties(name: str) -> set[str]:
    definitions = SCHEMA["$defs"]
    assert isinstance(definitions, dict)
    return set(definitions[name]["properties"])


@pytest.mark.parametrize(
    ("begin", "end", "keys"),
    [
        ("## model-config.yaml", "### `torchrun:`", set(SCHEMA["properties"]) - SECTIONS),  # type: ignore[call-overload]
        ("### `torchrun:`", "### `minserve:`", properties("TorchrunConfig")),
        ("### `minserve:`", "### Where minserve deliberately differs from TorchServe", properties("MinServeConfig")),
    ],
)
def test_every_option_has_its_row(begin: str, end: str, keys: set[str]) -> None:
    assert rows(begin, end) == keys


def test_the_server_options_are_what_the_code_says() -> None:
    begin = "<!-- from `python -m minserve.config.reference` -->\n\n"
    there = TEXT.partition(begin)[2].partition("\n\n<!-- to here -->")[0]
    assert there == server_options(), "put the output of `python -m minserve.config.reference` in its place"
