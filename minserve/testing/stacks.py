"""Where each rank stands: its Python stacks, asked for with a signal that works while C code holds the GIL."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from minserve.wire.board import STACK_SIGNAL

LOOK_S = 0.02
SETTLED_LOOKS = 4  # without growth: faulthandler writes a stack line by line
# minserve's own threads in a rank say nothing about a handler.
_OURS = re.compile(r"/minserve/rank/(?:vitals\.py\", line \d+ in _beat|process\.py\", line \d+ in watch)")


def read_stacks(directory: Path, pids: Mapping[int, int], timeout: float) -> dict[int, str]:
    """The stacks of the threads of each rank, newest call first; of one that gives none, the reason in brackets.

    Args:
        directory: the rank group's, in which each rank has a file for its stacks.
        pids: by rank.
        timeout: seconds for all of them together.
    """
    asked: dict[int, _Stack] = {}
    stacks: dict[int, str] = {}
    for rank, pid in pids.items():
        stack = _Stack(directory / f"stack.{rank}")
        if not stack.exists or not _listens(pid):
            stacks[rank] = f"(no stack: pid {pid} {_state(pid)})"
            continue
        os.kill(pid, STACK_SIGNAL)
        asked[rank] = stack
    deadline = time.monotonic() + timeout
    while not all(stack.settled() for stack in asked.values()) and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    for rank, stack in asked.items():
        stacks[rank] = stack.text() or f"(no stack within {timeout:g} s: pid {pids[rank]} {_state(pids[rank])})"
    return dict(sorted(stacks.items()))


class _Stack:
    """One rank's file, from where it ended before the signal."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.exists = path.exists()
        self._begin = self._size = path.stat().st_size if self.exists else 0
        self._looks = 0

    def settled(self) -> bool:
        """Whether it has grown, and then has not for a few looks."""
        size = self._path.stat().st_size if self._path.exists() else self._size
        self._looks = self._looks + 1 if size == self._size else 0
        self._size = size
        return size > self._begin and self._looks >= SETTLED_LOOKS

    def text(self) -> str:
        """What has come."""
        try:
            written = self._path.read_bytes()[self._begin :].decode(errors="replace")
        except FileNotFoundError:  # the group has ended meanwhile
            return ""
        threads = re.split(r"\n(?=Thread |Current thread )", written)
        return "\n".join(thread.strip() for thread in threads if not _OURS.search(thread)).strip()


def _listens(pid: int) -> bool:
    """Whether it has a handler for the signal, which would end it otherwise."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (STACK_SIGNAL - 1) & 1)


def _state(pid: int) -> str:
    try:
        return f"is {psutil.Process(pid).status()}"
    except psutil.Error:
        return "has ended"
