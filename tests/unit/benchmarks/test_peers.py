"""What is read of the peers, and what happens where one cannot be had."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.benchmarks.peers import environments
from tests.benchmarks.peers.environments import Environments, PeerError
from tests.benchmarks.scenarios.delivery import count_wrong
from tests.benchmarks.workspace import ECHO, Model


def test_an_environment_that_cannot_be_made_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    def fail(command: object, **more: object) -> None:
        tried.append(command)
        raise subprocess.CalledProcessError(1, "pip", stderr="trying\nno such package\n")

    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", fail)
    peers = Environments()
    for _ in range(2):
        with pytest.raises(PeerError, match="cannot be made: no such package"):
            peers.bin("mosec")
    assert len(tried) == 1


def test_an_environment_that_is_given_is_not_made(tmp_path: Path) -> None:
    assert Environments(given={"ray": tmp_path}).bin("ray") == tmp_path / "bin"
    with pytest.raises(PeerError, match="not chosen"):
        Environments(chosen=()).bin("ray")


@pytest.mark.parametrize(
    ("second", "wrong"), [("1234", 0), ("124", 1), ("12234", 1), ("1324", 1), ("4123", 1), ("", 4), ("9", 4)]
)
def test_what_rank_1_got_is_compared_with_rank_0(second: str, wrong: int) -> None:
    assert count_wrong("1234", second) == wrong


def test_a_delay_of_0_is_raised_for_who_takes_none() -> None:
    model = Model("echo", (ECHO,))
    assert "maxBatchDelay: 0\n" in model.config()
    assert "maxBatchDelay: 1\n" in model.config(least_delay=1)
    assert "torchrun" not in Model("echo", (ECHO,), ranks=0).config()
