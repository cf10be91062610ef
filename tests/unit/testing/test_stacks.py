import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minserve.testing.stacks import read_stacks
from minserve.wire.board import STACK_SIGNAL

Spawn = Callable[[str], int]

LISTENS = f"""
import faulthandler, sys
file = open(sys.argv[1], "wb", buffering=0)
faulthandler.register({int(STACK_SIGNAL)}, file, all_threads=True)
"""
WAITS = """
def wait_here():
    print(flush=True)
    sys.stdin.read()
wait_here()
"""


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Processes that have come to where they wait."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(code: str) -> int:
        command = [sys.executable, "-c", code, str(tmp_path / f"stack.{len(processes)}")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        processes.append(process)
        return process.pid

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_each_rank_tells_where_it_stands(spawn: Spawn, tmp_path: Path) -> None:
    pids = {rank: spawn(LISTENS + WAITS) for rank in (0, 1)}
    for _ in range(2):
        stacks = read_stacks(tmp_path, pids, 10)
        assert list(stacks) == [0, 1]
        for stack in stacks.values():
            assert stack.count("most recent call first") == 1  # not that of the call before, too
            assert "in wait_here" in stack


def test_minserves_own_threads_are_left_out(spawn: Spawn, tmp_path: Path) -> None:
    ours = """
import threading
release = threading.Event()
code = compile("def _beat(): release.wait()", "/site/minserve/rank/vitals.py", "exec")
exec(code)
threading.Thread(target=_beat, daemon=True).start()
threading.Thread(target=lambda: release.wait(), name="handler's", daemon=True).start()
"""
    stack = read_stacks(tmp_path, {0: spawn(LISTENS + ours + WAITS)}, 10)[0]
    assert "_beat" not in stack
    assert stack.count("most recent call first") == 2


def test_a_process_that_does_not_listen_is_left_in_peace(spawn: Spawn, tmp_path: Path) -> None:
    pid = spawn("import sys" + WAITS)
    (tmp_path / "stack.0").touch()
    for _ in range(2):  # the signal would have ended it
        assert read_stacks(tmp_path, {0: pid}, 0.1)[0].startswith(f"(no stack: pid {pid} is ")


def test_no_file_and_no_process_are_told(spawn: Spawn, tmp_path: Path) -> None:
    pid = spawn("import sys" + WAITS)
    gone = 2**22 + 1
    (tmp_path / "stack.1").touch()
    stacks = read_stacks(tmp_path, {0: pid, 1: gone}, 0.1)
    assert stacks[0].startswith(f"(no stack: pid {pid} is ")
    assert stacks[1] == f"(no stack: pid {gone} has ended)"
