import pytest

from minserve.worker.agent_report import FirstFailure, before_report, first_failure
from tests.unit.worker.agents import torchrun_says


@pytest.mark.parametrize("code", [1, 137, -9, -11])
@pytest.mark.parametrize("first", [0, 1, 11])
def test_the_rank_that_ended_first_is_read(first: int, code: int) -> None:
    report = torchrun_says(dict.fromkeys(range(12), -15) | {first: code}, first)
    assert first_failure(report.splitlines()) == FirstFailure(first, 1000 + first, code)


def test_one_rank_alone_is_read() -> None:
    assert first_failure(torchrun_says({0: 3}, 0).splitlines()) == FirstFailure(0, 1000, 3)


@pytest.mark.parametrize(
    "text", ["", "usage: torchrun\ntorchrun: error: bad option", "Root Cause (first observed failure):\n[0]:"]
)
def test_whoever_names_nobody_is_no_report(text: str) -> None:
    assert first_failure(text.splitlines()) is None
    assert before_report(text.splitlines()) == text.splitlines()


def test_what_the_ranks_said_comes_before_the_report() -> None:
    lines = ["rank: hello", "rank: no more", *torchrun_says({0: -15, 1: 7}, 1).splitlines()]
    assert before_report(lines) == lines[:3]
