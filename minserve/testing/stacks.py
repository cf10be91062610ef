"""Where each rank of a group under test stands: its Python stacks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from minserve.wire.stacks import StackFile

LOOK_S = 0.02


def read_stacks(directory: Path, pids: Mapping[int, int], timeout: float) -> dict[int, str]:
    """The stacks of the threads of each rank, newest call first; of one that gives none, the reason in brackets.

    Args:
        directory: the rank group's, in which each rank has a file for its stacks.
        pids: by rank.
        timeout: seconds for all of them together.
    """
    files = {rank: StackFile(directory, rank) for rank in pids}
    asked = {rank: file for rank, file in files.items() if file.ask(pids[rank])}
    deadline = time.monotonic() + timeout
    waiting = list(asked.values())
    while waiting and time.monotonic() < deadline:
        time.sleep(LOOK_S)
        waiting = [file for file in waiting if not file.settled()]
    stacks: dict[int, str] = {}
    for rank, pid in sorted(pids.items()):
        if rank not in asked:
            stacks[rank] = f"(no stack: pid {pid} {_state(pid)})"
        else:
            stacks[rank] = asked[rank].text() or f"(no stack within {timeout:g} s: pid {pid} {_state(pid)})"
    return stacks


def _state(pid: int) -> str:
    try:
        return f"is {psutil.Process(pid).status()}"
    except psutil.Error:
        return "has ended"
