# ruff: noqa: ASYNC220  # tiny processes, with nothing else on the loop
import asyncio
import os
import platform
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from minserve.worker.processes import (
    Watch,
    children,
    exit_code,
    kill_leftovers,
    kill_tree,
    oom_kills,
    reaped_exit_code,
)
from minserve.worker.reaper import Reaper

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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_process_that_was_reaped_before_we_looked_still_tells(waiting: Child, number: signal.Signals) -> None:
    """On a busy machine torchrun may be first."""
    if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 15):
        pytest.skip("the kernel does not remember it")
    exits = Exits()
    Watch(waiting.pid, exits)
    waiting.send_signal(number)
    waiting.wait()
    assert exit_code(waiting.pid) is None
    assert await exits.wait() == [-number]


async def test_a_living_process_is_not_taken_for_one_that_was_reaped(waiting: Child) -> None:
    pidfd = os.pidfd_open(waiting.pid)
    assert reaped_exit_code(pidfd) is None
    os.close(pidfd)


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


# ── kill_leftovers ──

# A rank that starts helpers, prints the pid of each, and ends.
LEAVES = """
import os, sys
def helper(then=lambda: None):
    if os.fork() == 0:
        os.setsid()
        then()
        os.write(1, b"%d\\n" % os.getpid())
        os.execvpe("cat", ["cat"], {} if len(sys.argv) > 1 else os.environ)
helper(lambda: helper() if len(sys.argv) == 1 else None)
helper()
"""


@pytest_asyncio.fixture
async def adopting() -> AsyncIterator[None]:
    """The orphans of the test become its children."""
    reaper = Reaper()
    yield
    reaper.close()


Leave = Callable[..., list[int]]


@pytest.fixture
def leave() -> Iterator[Leave]:
    """Runs such a rank of an incarnation to its end; the pids of the helpers that are left."""
    reader, writer = os.pipe()
    left: list[int] = []

    def run(incarnation: str, count: int, *arguments: str) -> list[int]:
        environ = {**os.environ, "MINSERVE_WORKER": incarnation}
        command = [sys.executable, "-c", LEAVES, *arguments]
        with subprocess.Popen(command, stdin=reader, stdout=subprocess.PIPE, env=environ) as process:
            assert process.stdout is not None
            pids = [int(process.stdout.readline()) for _ in range(count)]
            process.stdout.close()
        left.extend(pids)
        return pids

    yield run
    for pid in set(left) & set(children(os.getpid())):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os.close(reader)
    os.close(writer)


async def test_helpers_in_sessions_of_their_own_are_killed_with_their_group(adopting: None, leave: Leave) -> None:
    mine = leave("m-0-aa", 3)
    others = leave("m-0-aab", 3)
    assert kill_leftovers("m-0-aa") == sorted(mine)
    assert ended(mine) == [True] * 3
    assert [exit_code(pid) for pid in others] == [None] * 3
    assert kill_leftovers("m-0-aa") == []
    assert kill_leftovers("m-0-aab") == sorted(others)


async def test_what_a_helper_has_started_is_killed_with_it_whatever_its_environment(adopting: None) -> None:
    script = "import os, subprocess\nprint(subprocess.Popen(['cat'], env={}, stdin=0).pid, flush=True)\nos.read(0, 1)"
    command = [sys.executable, "-c", script]
    environ = {**os.environ, "MINSERVE_WORKER": "m-0-bb"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ) as helper:
        assert helper.stdout is not None
        pid = int(helper.stdout.readline())
        assert kill_leftovers("m-0-bb") == sorted([helper.pid, pid])
        assert ended([helper.pid, pid]) == [True] * 2


async def test_with_nothing_left_behind_nothing_is_killed(adopting: None, waiting: Child) -> None:
    assert kill_leftovers("m-0-cc") == []
    assert waiting.poll() is None


async def test_looking_for_leftovers_costs_little(adopting: None, waiting: Child) -> None:
    """It is done on the event loop, and must not look at every process of the machine."""
    began = time.process_time()
    for _ in range(100):
        kill_leftovers("m-0-dd")
    assert time.process_time() - began < 1.0


async def test_children_are_told_of_every_thread(waiting: Child) -> None:
    process = await asyncio.to_thread(lambda: subprocess.Popen(["true"]))
    assert {waiting.pid, process.pid} <= set(children(os.getpid()))
    process.wait()
    assert process.pid not in children(os.getpid())
    assert children(process.pid) == []


# ── oom_kills ──


def machine(tmp_path: Path, memberships: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(memberships)
    for name, text in files.items():
        path = cgroups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, cgroups


EVENTS = "low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"


@pytest.mark.parametrize(
    ("memberships", "files", "kills"),
    [
        ("0::/user.slice/x\n", {"user.slice/x/memory.events": EVENTS}, 3),
        ("0::/\n", {"memory.events": EVENTS}, 3),
        ("0::/host/s/path\n", {"memory.events": EVENTS}, 3),
        ("5:cpu,memory:/x\n0::/\n", {"memory/x/memory.oom_control": CONTROL}, 7),
        ("5:memory:/host/s/path\n0::/\n", {"memory/memory.oom_control": CONTROL}, 7),
        ("5:memory:/x\n", {"memory/x/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"}, None),
        ("9:name=systemd:/x\n1:cpu:/\n", {"memory.events": EVENTS}, None),
        ("0::/\n", {"cgroup.controllers": "memory\n"}, None),
        ("", {}, None),
    ],
)
async def test_out_of_memory_kills_are_counted_by_the_control_group(
    tmp_path: Path, memberships: str, files: dict[str, str], kills: int | None
) -> None:
    assert oom_kills(*machine(tmp_path, memberships, files)) == kills


async def test_without_control_groups_there_is_no_count(tmp_path: Path) -> None:
    assert oom_kills(tmp_path, tmp_path) is None
