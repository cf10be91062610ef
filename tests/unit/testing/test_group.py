import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.testing import Group, StartFailed
from minserve.testing.running import RunningServer

LOG = """\
2026-11-25 03:09:42,118 INFO    sum/0 rank 0: importing
2026-11-25 03:09:42,118 INFO    sum/0 rank 0 | loading rank 0
2026-11-25 03:09:42,119 INFO    sum/0 rank 1 | loading | rank 1
2026-11-25 03:09:42,119 DEBUG   sum/0 torchrun | says nothing of note
2026-11-25 03:09:43,000 INFO    sum/0 rank 10 | not rank 1
sum/0 rank 1 | one of
sum/0 rank 1 | many lines
2026-11-25 03:09:43,000 INFO    some/sum/0 rank 1 | another model
2026-11-25 03:09:44,000 INFO    sum/0 rank 1 |
"""
TORCHRUN = 2**22 + 7  # no process has so large a pid


class Server(RunningServer):
    """A server that is not there, and says what a test wants."""

    def __init__(self, process: subprocess.Popen[bytes], rank: subprocess.Popen[bytes], runtime: Path) -> None:
        super().__init__(process, runtime / "log", runtime)
        self.worker: dict[str, object] = {"id": "0", "state": "READY", "restarts": 0, "pid": TORCHRUN, "ranks": []}
        self.models: list[dict[str, object]] = []  # what is said next, before what is said in the end
        self.rank = rank
        self.ranks(rank.pid, 0)

    def ranks(self, *pids: int) -> None:
        self.worker["ranks"] = [{"rank": rank, "pid": pid} for rank, pid in enumerate(pids)]

    def describe(self, model: str) -> dict[str, object]:
        assert model == "sum"
        return self.models.pop(0) if self.models else {"workers": [self.worker]}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """It has a rank 0, and a rank 1 that has not said HELLO."""
    (tmp_path / "log").write_text(LOG)
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(2)]
    yield Server(processes[0], processes[1], tmp_path)
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def group(server: Server) -> Group:
    return Group("sum", server)


def test_the_log_of_a_rank_is_its_own_lines(group: Group) -> None:
    assert group.log(0) == "loading rank 0"
    assert group.log(1) == "loading | rank 1\none of\nmany lines\n"
    assert group.log(2) == ""
    assert group.log() == LOG


def test_a_lethal_fault_is_over_when_other_processes_are_ready(group: Group, server: Server) -> None:
    group.inject("kill")
    assert server.rank.wait(10) == -9
    old = {**server.worker}
    server.models = [{"workers": [old]}, {"workers": [{**old, "state": "LOADING", "ranks": []}]}]
    server.ranks(TORCHRUN + 1, TORCHRUN + 2)
    group.wait_ready(10)
    assert server.models == []
    assert group.pids == [TORCHRUN + 1, TORCHRUN + 2]


@pytest.mark.parametrize(
    ("fault", "rank", "message"),
    [
        ("kil", 0, "fault: found 'kil', allowed: kill, "),
        ("kill", 1, "rank: found 1, allowed: 0"),
        ("kill", -1, "rank: found -1, allowed: 0"),
    ],
)
def test_what_cannot_be_injected_is_told(group: Group, fault: str, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group.inject(fault, rank=rank)


def test_a_single_process_has_no_torchrun(group: Group, server: Server) -> None:
    server.worker["pid"] = server.rank.pid
    with pytest.raises(
        ValueError, match="found 'kill-torchrun', allowed with ranks under torchrun; sum is one process"
    ):
        group.inject("kill-torchrun")
    server.worker["pid"] = TORCHRUN
    with pytest.raises(ProcessLookupError):
        group.inject("kill-torchrun")


def test_a_group_that_does_not_come_is_told_with_its_last_error(group: Group, server: Server) -> None:
    server.worker |= {"state": "LOADING", "lastError": "rank 1 died"}
    with pytest.raises(TimeoutError, match=r"sum: LOADING after 0\.05 s; its last error: rank 1 died"):
        group.wait_ready(0.05)


def test_a_group_that_is_given_up_is_not_waited_for(group: Group, server: Server) -> None:
    server.models = [{"unhealthy": "sum/0: rank 1 cannot load", "workers": [server.worker]}]
    with pytest.raises(StartFailed, match="rank 1 cannot load"):
        group.wait_ready()
    server.process.kill()
    server.process.wait()
    with pytest.raises(StartFailed, match=r"the server has ended:\n.*importing"):
        group.wait_ready()


def explain(group: Group, error: BaseException) -> list[str]:
    """The notes of an exception that a test has raised."""
    with pytest.raises(type(error)) as raised, group.explaining():
        raise error
    return getattr(raised.value, "__notes__", [])


def test_an_exception_gets_the_lines_and_the_stacks_of_each_rank(group: Group, server: Server) -> None:
    server.worker |= {"restarts": 2, "lastError": "sum/0: rank 1 died"}
    (note,) = explain(group, AssertionError("4 is not 5"))
    assert note.splitlines()[:2] == ["sum is READY; restarts: 2", "last error: sum/0: rank 1 died"]
    assert "── rank 0, last lines ──\nloading rank 0\n── rank 0, stacks ──\n(no stack: " in note


def test_the_same_exception_is_explained_once(group: Group) -> None:
    error = AssertionError()
    assert len(explain(group, error)) == 1
    assert len(explain(group, error)) == 1


def test_whoever_leaves_gets_no_explanation(group: Group) -> None:
    assert explain(group, KeyboardInterrupt()) == []


def test_a_test_s_exception_is_seen_even_when_the_server_is_gone(group: Group, server: Server) -> None:
    server.models = [{}]
    (note,) = explain(group, AssertionError())
    assert note.startswith("sum: its ranks cannot be asked (KeyError('workers')). The log ends with:")
    assert "many lines" in note
