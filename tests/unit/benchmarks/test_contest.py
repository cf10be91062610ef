"""Turns, and what becomes of who fails in one."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.benchmarks.contest import OURS, Load, LoadError, pick, take_turns
from tests.benchmarks.peers.environments import Environments
from tests.benchmarks.plan import Plan
from tests.benchmarks.run import Run
from tests.benchmarks.workspace import Workspace

PLAN = Plan("none", rounds=2, seconds=1, warm_up_s=0, idle_s=0, starts=1, ranks=(), sizes=())


@dataclass
class Fake:
    name: str
    turns: list[str]
    fails_in: int = 0
    count: int = field(default=0, init=False)

    def check(self) -> None: ...

    def turn(self, seconds: int) -> Load:
        self.count += 1
        self.turns.append(self.name)
        if self.count == self.fails_in:
            raise LoadError("3 requests failed")
        return Load(100.0, 10.0, 20.0)


@pytest.fixture
def run() -> Run:
    with Workspace() as workspace:
        return Run(PLAN, workspace, Environments())


def test_contestants_take_turns(run: Run) -> None:
    turns: list[str] = []
    loads = take_turns(run, "load", {"a": Fake(OURS, turns), "b": Fake("peer", turns)})
    assert turns == [OURS, "peer", OURS, "peer"]
    assert pick(loads, "b", "p50_us") == [10.0, 10.0]


def test_a_peer_that_fails_is_left_out_and_named(run: Run) -> None:
    turns: list[str] = []
    loads = take_turns(run, "load", {"a": Fake(OURS, turns), "b": Fake("peer", turns, fails_in=2)})
    assert list(loads) == ["a"]
    assert pick(loads, "b", "p50_us") == []
    assert run.notes == ["peer, load, b: 3 requests failed"]


def test_a_failure_of_ours_is_an_error(run: Run) -> None:
    with pytest.raises(LoadError):
        take_turns(run, "load", {"a": Fake(OURS, [], fails_in=1)})
