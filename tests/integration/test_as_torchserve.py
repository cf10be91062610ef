"""minserve against what TorchServe 0.12.0 said to the same calls: recorded, so that the suite needs no Java.

`python -m tests.side_by_side --torchserve DIR --record` records anew.
"""

from __future__ import annotations

import os
import sys

import pytest

from tests.side_by_side import comparison
from tests.side_by_side.__main__ import OURS, RECORDED
from tests.side_by_side.archives import build_store
from tests.side_by_side.comparison import Answers
from tests.side_by_side.differences import REASONS
from tests.side_by_side.lives import LIVES

THEIRS = comparison.read(RECORDED)
NAMES = [f"{life.name}: {call.name}" for life in LIVES for call in life.calls]
NAMES += [f"{life.name}: log has {pattern}" for life in LIVES for pattern in life.log]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("as-torchserve")
    for part in ("store", "work", "ours"):
        (folder / part).mkdir()
    build_store(folder / "store", folder / "work", (sys.executable, "-m", "minserve", "archive"))
    return comparison.live(OURS, os.environ, folder / "ours", folder / "store", LIVES)


def test_everything_that_is_asked_has_been_recorded() -> None:
    assert set(NAMES) == THEIRS.keys()
    assert REASONS.keys() <= THEIRS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_torchserves_unless_there_is_a_reason(ours: Answers, name: str) -> None:
    differences = comparison.compare({name: THEIRS[name]}, {name: ours[name]})
    if name in REASONS:
        assert differences, "the reason is out of date: the answers are equal"
    for difference in differences:
        assert difference.explained, str(difference)
