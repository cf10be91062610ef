# ruff: noqa: ASYNC220  # tiny processes, with nothing else on the loop
import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.worker.processes import Watch, exit_code, kill_tree

pytestmark = pytest.mark.asyncio

Child = subprocess.Popen[bytes]


class Exits:
    """What a Watch has told."""

    def __init__(self) -> None:
        self.codes: list[int | None] = []
        self.told = asyncio.Event()

    def __call__(self, code: int | None) -> None:
        self.codes.append(code)
        self.told.set()

    async def wait(self) -> list[int | None]:
        async with asyncio.timeout(30):
            await self.told.wait()
        return self.codes


def shell(script: str) -> Child:
    return subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True)


@pytest.fixture
def waiting() -> Iterator[Child]:
    """A process that goes on until something ends it."""
    with shell("exec cat") as child:
        yield child
        child.kill()


@pytest.mark.parametrize("code", [0, 7, 137])
async def test_a_watch_tells_the_exit_code_before_the_parent_has_reaped(code: int) -> None:
    exits = Exits()
    with shell(f"read line; exit {code}") as child:
        watch = Watch(child.pid, exits)
        assert not watch.ended.is_set()
        assert child.stdin is not None
        child.stdin.close()
        assert await exits.wait() == [code]
        assert watch.ended.is_set()
        watch.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
async def test_a_watch_tells_the_signal_as_a_negative_code(waiting: Child, number: signal.Signals) -> None:
    exits = Exits()
    Watch(waiting.pid, exits)
    waiting.send_signal(number)
    assert await exits.wait() == [-number]


async def test_a_watch_tells_how_a_process_of_somebody_elses_ended() -> None:
    """A rank is torchrun's child, which looks at it ten times a second only."""
    code = "import os, sys, signal\nprint(os.fork() or os._exit(len(sys.stdin.readline())), flush=True)\nsignal.pause()"
    exits = Exits()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        Watch(int(parent.stdout.readline()), exits)
        parent.stdin.write(b"12345\n")
        parent.stdin.close()
        assert await exits.wait() == [6]
        parent.kill()


async def test_a_process_that_is_gone_has_vanished(waiting: Child) -> None:
    waiting.kill()
    waiting.wait()
    exits = Exits()
    watch = Watch(waiting.pid, exits)
    assert exits.codes == [], "not before the constructor has returned"
    assert await exits.wait() == [None]
    assert watch.ended.is_set()
    assert exit_code(waiting.pid) is None


async def test_a_closed_watch_tells_nothing(waiting: Child) -> None:
    watched, unwatched = Exits(), Exits()
    Watch(waiting.pid, unwatched).close()
    Watch(waiting.pid, watched)
    waiting.kill()
    await watched.wait()
    assert unwatched.codes == []


async def test_a_living_process_has_no_exit_code(waiting: Child) -> None:
    assert exit_code(waiting.pid) is None


@pytest.mark.parametrize("name", ["a) Z 1 2", "((", "sp ace"])
async def test_a_process_may_be_called_anything(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/bin/sh")
    exits = Exits()
    with subprocess.Popen([tmp_path / name, "-c", "exit 9"]) as child:
        Watch(child.pid, exits)
        assert await exits.wait() == [9]


# ── kill_tree ──

# Prints its own pid and those below it, each on a line; `session` makes a leader of its own, as torchrun does of a rank.
TREE = """
import os, signal, sys
def child(session, then):
    pid = os.fork()
    if pid == 0:
        if session:
            os.setsid()
        then()
        signal.pause()
def tell(more=lambda: None):
    more()
    os.write(1, b"%d\\n" % os.getpid())
child(True, lambda: tell(lambda: child(False, tell)))   # a rank and its data worker
child(True, lambda: tell(lambda: child(True, tell)))    # a rank and a helper that has left its group
os.write(1, b"agent\\n")
signal.pause()
"""


def ended(pids: list[int]) -> list[bool]:
    result = []
    for pid in pids:
        poll = select.poll()
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            result.append(True)
            continue
        poll.register(fd, select.POLLIN)
        result.append(bool(poll.poll(10_000)))
        os.close(fd)
    return result


@pytest.fixture
def tree() -> Iterator[tuple[Child, list[int]]]:
    with subprocess.Popen([sys.executable, "-c", TREE], stdout=subprocess.PIPE, start_new_session=True) as agent:
        assert agent.stdout is not None
        lines = [agent.stdout.readline().strip() for _ in range(5)]
        pids = [int(line) for line in lines if line != b"agent"]
        assert len(pids) == 4
        yield agent, pids
        for pid in [*pids, agent.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


async def test_the_whole_tree_is_killed_ranks_that_never_said_hello_included(tree: tuple[Child, list[int]]) -> None:
    agent, pids = tree
    kill_tree(agent.pid, [])
    assert ended([agent.pid, *pids]) == [True] * 5


async def test_without_the_agent_the_ranks_groups_are_killed(tree: tuple[Child, list[int]]) -> None:
    agent, pids = tree
    leaders = [pid for pid in pids if os.getsid(pid) == pid]
    agent.kill()
    agent.wait()
    kill_tree(agent.pid, leaders)
    assert ended(pids) == [True] * 4


async def test_killing_what_is_gone_is_fine(waiting: Child) -> None:
    waiting.kill()
    waiting.wait()
    kill_tree(waiting.pid, [waiting.pid])
