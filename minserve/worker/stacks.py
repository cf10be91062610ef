"""The ranks' Python stacks, asked for by a signal and written by faulthandler (rank/vitals.py).

It needs neither the GIL nor the rank's main thread, so also a rank that hangs in C tells where it was called from.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minserve.wire.board import STACK_SIGNAL
from minserve.worker.hang import STOPPED
from minserve.worker.processes import process_state

if TYPE_CHECKING:
    from collections.abc import Mapping

ASK_S = 1.0  # for all ranks to have written theirs; it takes milliseconds
LOOK_S = 0.02
MAX_BYTES = 64 * 1024  # of one rank's
# `  File "/path/handler.py", line 12 in infer`, newest call first, below a line for the thread; the main thread is last.
_THREAD = re.compile(r"^(?:Current thread|Thread) .*$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_OUR_THREADS = (("/minserve/rank/vitals.py", "_beat"), ("/minserve/rank/process.py", "watch"))
_INSTALLED = ("/lib/python3", "/site-packages/", "/dist-packages/", "<frozen ")
_COLLECTIVES = "/torch/distributed/"


@dataclass(frozen=True, slots=True)
class Stack:
    """The stacks of one rank's threads as faulthandler wrote them."""

    text: str

    @property
    def collective(self) -> bool:
        """Whether a thread is inside torch.distributed."""
        return any(_COLLECTIVES in file for frames in self._threads() for file, _, _ in frames)

    def __str__(self) -> str:
        """Where its main thread is, in words: the last place in code that the model's author knows."""
        threads = self._threads()
        if not threads:
            return "somewhere that its stack does not tell"
        frames = threads[-1]
        file, line, function = next(
            (frame for frame in frames if not any(map(frame[0].__contains__, _INSTALLED))), frames[0]
        )
        return f"at {os.path.basename(file)}:{line} in {function}"

    def _threads(self) -> list[list[tuple[str, str, str]]]:
        """File, line and function of each frame of each thread, without minserve's own threads."""
        threads = [_FRAME.findall(part) for part in _THREAD.split(self.text)]
        return [frames for frames in threads if frames and not any(map(_is_ours, frames))]


def _is_ours(frame: tuple[str, str, str]) -> bool:
    file, _, function = frame
    return any(file.endswith(ours) and function == name for ours, name in _OUR_THREADS)


async def ask(directory: Path, pids: Mapping[int, int]) -> dict[int, Stack]:
    """The stacks of these ranks, by rank: those that have written one within a second.

    Args:
        directory: where the ranks' stack files are.
        pids: of each rank, which must have said HELLO: before that the signal would end it.
    """
    files = {rank: directory / f"stack.{rank}" for rank in pids}
    before = {rank: _size(file) for rank, file in files.items()}
    waiting: set[int] = set()
    for rank, pid in pids.items():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACK_SIGNAL)
            if process_state(pid) not in STOPPED:  # such a rank writes nothing until somebody continues it
                waiting.add(rank)
    seen = dict(before)
    deadline = asyncio.get_running_loop().time() + ASK_S
    while waiting and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(LOOK_S)
        for rank in list(waiting):
            size = _size(files[rank])
            if size > before[rank] and size == seen[rank]:  # it has grown, and grows no more
                waiting.discard(rank)
            seen[rank] = size
    return {rank: _read(files[rank], before[rank]) for rank in pids if seen[rank] > before[rank]}


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _read(file: Path, start: int) -> Stack:
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            return Stack(stream.read(MAX_BYTES).decode("utf-8", "replace"))
    except OSError:
        return Stack("")
