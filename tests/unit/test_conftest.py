"""In how many processes the tests run, and that they do without the plugin that starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.conftest import pytest_xdist_auto_num_workers

ROOT = Path(__file__).parents[2]
ONE, OTHER = __file__, str(ROOT / "tests" / "unit" / "test_ports.py")


@pytest.mark.parametrize(
    ("cores", "arguments", "processes"),
    [
        pytest.param(1, [str(ROOT / "tests")], 2, id="one core"),
        pytest.param(2, [str(ROOT / "tests")], 2, id="two cores"),
        pytest.param(3, [str(ROOT / "tests")], 3, id="three cores"),
        pytest.param(64, [str(ROOT / "tests")], 4, id="many cores"),
        pytest.param(2, [ONE], 0, id="a file"),
        pytest.param(2, [f"{ONE}::test_a", f"{ONE}::test_b[c::d]"], 0, id="tests of a file"),
        pytest.param(64, [ONE, f"{OTHER}::test_a"], 2, id="two files"),
        pytest.param(64, [ONE, str(ROOT / "tests")], 4, id="a file and a folder"),
    ],
)
def test_there_are_as_many_processes_as_are_of_use(
    cores: int, arguments: list[str], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    config = cast("pytest.Config", SimpleNamespace(args=arguments))
    assert pytest_xdist_auto_num_workers(config) == processes


def test_they_run_without_xdist() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "--collect-only",
        "-q",
        OTHER,
    ]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert collected.returncode == 0, collected.stderr
