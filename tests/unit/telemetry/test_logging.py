import io
import logging
import sys
from collections.abc import Iterator

import pytest

from minserve.telemetry.logging import configure


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Puts back what `configure` changes for the whole process."""
    root, ours = logging.getLogger(), logging.getLogger("minserve")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.mark.parametrize(
    ("level", "shown"),
    [("debug", "debug info warning"), ("info", "info warning"), ("warning", "warning"), ("error", "")],
)
def test_the_level_is_minserves_own(level: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure(level)
    for name in ("debug", "info", "warning"):
        getattr(logging.getLogger("minserve.worker"), name)(f"ours: {name}")
        getattr(logging.getLogger("aiohttp"), name)(f"theirs: {name}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("ours: ")[2] for line in lines if "ours" in line] == shown.split()
    assert [line.rpartition("theirs: ")[2] for line in lines if "theirs" in line] == ["warning"]


def test_lines_go_to_whatever_stderr_is_at_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    configure("info")
    live = io.StringIO()
    monkeypatch.setattr(sys, "stderr", live)
    logging.getLogger("minserve").info("above the table")
    assert live.getvalue().endswith(" INFO    above the table\n")


def test_configuring_twice_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info")
    configure("info")
    logging.getLogger("minserve").info("once")
    assert capsys.readouterr().err.count("once") == 1
