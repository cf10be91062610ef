"""Figures become rows, and rows a table."""

from __future__ import annotations

from tests.benchmarks.report import Aim, absolute, compare, failure, table


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    row = compare("s", "p50", "µs", [10, 20, 90], "other", [10, 10, 10], Aim("≤", 2))
    assert row.cells == ("p50", "20 µs", "other 10 µs", "2.00 (1.00, 9.00)", "≤ 2", "met")


def test_a_missed_aim_is_shown() -> None:
    assert compare("s", "rate", "", [50], "other", [100], Aim("≥", 0.55)).cells[-1] == "missed"
    assert absolute("s", "idle", "%", [2.0], Aim("<", 1, " %")).cells[-2:] == ("< 1 %", "missed")


def test_a_peer_that_is_not_there_leaves_its_row() -> None:
    row = compare("s", "rate", "", [50], "TorchServe", [], Aim("≥", 10))
    assert row.cells == ("rate", "50", "TorchServe: not measured", "", "≥ 10", "")


def test_a_round_in_which_the_other_was_at_zero_has_no_ratio() -> None:
    assert compare("s", "idle CPU", "%", [1, 2], "other", [0, 4]).cells[3] == "0.50 (0.50, 0.50)"
    assert compare("s", "idle CPU", "%", [1], "other", [0]).cells[3] == ""


def test_every_line_of_the_table_has_as_many_cells() -> None:
    rows = [compare("s", "a", "", [1], "o", [2]), absolute("s", "b", "", [1]), failure("s", RuntimeError("a|b\nc"))]
    lines = table(rows).splitlines()
    assert {line.count("|") for line in lines} == {8}
    assert "**failed**: RuntimeError: a/b" in lines[-1]
