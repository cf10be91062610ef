import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.testing import until
from minserve.wire.board import STACK_SIGNAL
from minserve.worker.processes import process_state
from minserve.worker.stacks import Stack, ask

CHILD = """
import faulthandler, sys, threading, time
file = open(sys.argv[1], "wb", buffering=0)
faulthandler.register({number}, file, all_threads=True)
def deep():
    print("ready", flush=True)
    {body}
deep()
"""


@contextlib.contextmanager
def child(file: Path, body: str) -> Iterator[subprocess.Popen[str]]:
    program = CHILD.format(number=int(STACK_SIGNAL), body=body)
    with subprocess.Popen([sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


# The last one is a call into C that holds the GIL for long: a regular expression that backtracks without end.
@pytest.mark.parametrize("body", ["time.sleep(600)", "while True: pass", "import re; re.match('(a+)+b', 'a' * 60)"])
def test_a_process_tells_where_it_is_whatever_it_does(tmp_path: Path, body: str) -> None:
    with child(tmp_path / "stack.1", body) as process:
        for _ in range(2):  # a second time, too: only what was asked for now
            stacks = asyncio.run(ask(tmp_path, {1: process.pid}))
            assert list(stacks) == [1]
            assert "in deep" in stacks[1].text
            assert stacks[1].text.count("most recent call first") == 1
            assert "in <module>" in stacks[1].text, "all of it has come"
            assert not stacks[1].collective


def test_who_does_not_tell_is_left_out(tmp_path: Path) -> None:
    with child(tmp_path / "stack.0", "time.sleep(600)") as process:
        gone = subprocess.Popen(["true"])
        gone.wait()
        stacks = asyncio.run(ask(tmp_path, {0: process.pid, 1: gone.pid}))
    assert list(stacks) == [0]


def test_who_is_stopped_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.worker.stacks.ASK_S", 600.0)
    with child(tmp_path / "stack.0", "time.sleep(600)") as one, child(tmp_path / "stack.1", "time.sleep(600)") as other:
        one.send_signal(signal.SIGSTOP)
        until(lambda: process_state(one.pid) == "T", 10.0, "one is stopped")
        stacks = asyncio.run(ask(tmp_path, {0: one.pid, 1: other.pid}))
    assert list(stacks) == [1]


def test_the_place_is_the_main_threads_which_comes_last() -> None:
    stack = Stack(
        "Thread 0x1 (most recent call first):\n"
        '  File "/a/pool.py", line 3 in worker\n'
        "\n"
        "Current thread 0x3 (most recent call first):\n"
        '  File "/usr/lib/python3.13/re/__init__.py", line 166 in match\n'
        '  File "/venv/lib/python3.13/site-packages/numpy/x.py", line 1 in call\n'
        '  File "/models/m/my handler.py", line 21 in <listcomp>\n'
        '  File "/site/minserve/rank/process.py", line 120 in run_to_the_end\n'
    )
    assert str(stack) == "at my handler.py:21 in <listcomp>"
    assert not stack.collective


@pytest.mark.parametrize("thread", [0, 1])
def test_a_thread_of_the_handlers_own_may_be_the_one_in_the_collective(thread: int) -> None:
    frames = [
        '  File "/models/m/handler.py", line 2 in run',
        '  File "/t/torch/distributed/x.py", line 3 in all_reduce',
    ]
    parts = [f"Thread 0x{number} (most recent call first):\n{frames[number == thread]}\n" for number in (0, 1)]
    assert Stack("\n".join(parts)).collective


@pytest.mark.parametrize(
    ("file", "function", "waits"),
    [
        ("socket_hops.py", "receive", True),
        ("group_hops.py", "wait", True),
        ("backlog.py", "wait", True),
        ("backlog.py", "_work", False),  # sends on while the stage works
        ("pipeline.py", "_work", False),  # runs the stage
    ],
)
def test_a_rank_that_waits_for_another_stage_is_as_one_in_a_collective(file: str, function: str, waits: bool) -> None:
    frames = f'  File "/x/minserve/handlers/{file}", line 9 in {function}\n  File "/m/handler.py", line 7 in inference'
    assert Stack(f"Thread 0x1 (most recent call first):\n{frames}").collective == waits


PAUSED = """Thread 0x1 (most recent call first):
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 9 in recv
  File "/x/minserve/rank/turns.py", line 9 in _receive
  File "/x/minserve/rank/overlap.py", line 9 in await_result
  File "/m/handler.py", line 7 in inference
  File "/x/minserve/rank/loop.py", line 9 in _run_batch"""
AT_WORK = """Thread 0x2 (most recent call first):
  File "/m/handler.py", line 3 in preprocess
  File "/x/minserve/rank/loop.py", line 9 in _run_batch"""
MAIN = """Thread 0x3 (most recent call first):
  File "/x/lib/python3.11/threading.py", line 9 in wait
  File "/x/minserve/rank/overlap.py", line 9 in serve"""


def test_of_several_batches_the_one_whose_turn_it_is_tells_where_the_rank_is() -> None:
    hangs = Stack(f"{PAUSED}\n\n{AT_WORK}\n\n{MAIN}")
    assert not hangs.collective
    assert str(hangs) == "at handler.py:3 in preprocess"
    waits = Stack(f"{PAUSED}\n\n{MAIN}")
    assert waits.collective


def test_a_stack_that_tells_nothing() -> None:
    assert str(Stack("<no Python frame>")) == "somewhere that its stack does not tell"
    assert not Stack("").collective
