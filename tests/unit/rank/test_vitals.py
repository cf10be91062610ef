from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minserve.wire.board import STACK_SIGNAL, Board
from tests.unit.rank.rig import DEADLINE_S

# A rank that says "ready" and then does nothing that anybody could notice.
RANK = """
    import ctypes, os, sys, threading
    from pathlib import Path
    from minserve.rank import vitals
    from minserve.rank.process import Launch

    def hang_in_python():
        while True: pass

    def hang_in_c_with_the_gil():
        ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)

    def hang_in_c():
        threading.Event().wait()

    vitals.show(Launch(1, 1, 2, "", "", "", Path(sys.argv[1]), False))
    print("ready", flush=True)
    globals()[sys.argv[2]]()
"""


class Rank:
    """A process that shows its vitals, and the board that it shows them on."""

    def __init__(self, directory: Path, hang: str) -> None:
        self.board = Board(directory / "board", 2)
        self.stack = directory / "stack.1"
        command = [sys.executable, "-c", textwrap.dedent(RANK), str(directory), hang]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.board.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Rank]]:
    ranks: list[Rank] = []

    def run(hang: str) -> Rank:
        ranks.append(Rank(tmp_path, hang))
        return ranks[0]

    yield run
    ranks[0].end()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # another process: there is nothing to wait for


@pytest.mark.parametrize("hang", ["hang_in_python", "hang_in_c"])
def test_the_heart_beats_whatever_the_main_thread_does(start: Callable[[str], Rank], hang: str) -> None:
    rank = start(hang)
    begin = rank.board.read(1).heartbeat
    wait_until(lambda: rank.board.read(1).heartbeat >= begin + 2)
    assert rank.board.read(0).heartbeat == 0
    assert rank.board.read(1).collectives == 0


@pytest.mark.parametrize("hang", ["hang_in_python", "hang_in_c", "hang_in_c_with_the_gil"])
def test_a_rank_that_answers_nothing_still_tells_where_it_is(start: Callable[[str], Rank], hang: str) -> None:
    """And goes on where it was: the signal is to a process that may be in the middle of a batch."""
    rank = start(hang)
    for _ in range(2):
        asked = rank.stack.stat().st_size

        def told(asked: int = asked) -> str:
            return rank.stack.read_text()[asked:]

        # Once more where the first came before the main thread was as far as there.
        while f" in {hang}\n" not in told():
            size = rank.stack.stat().st_size
            os.kill(rank.process.pid, STACK_SIGNAL)
            wait_until(lambda size=size: rank.stack.read_text()[size:].endswith(" in <module>\n"))  # type: ignore[misc]
        assert "minserve/rank/vitals.py" in told()  # all threads
    assert rank.process.poll() is None
