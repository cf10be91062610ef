"""The Python stacks of all ranks of a group, and what they tell of a hang."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minserve.wire.stacks import StackFile
from minserve.worker.processes import STOPPED, process_state

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ASK_S = 1.0  # for all ranks to have written theirs; it takes milliseconds
LOOK_S = 0.02
# `  File "/path/handler.py", line 12 in infer`, newest call first, below a line for the thread; the main thread is last.
_THREAD = re.compile(r"^(?:Current thread|Thread) .*$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_INSTALLED = ("/lib/python3", "/site-packages/", "/dist-packages/", "<frozen ")
_COLLECTIVES = "/torch/distributed/"
# A pipeline's own waiting for other stages: for what one sends, and until one has taken what this one has sent.
_HOPS = (
    ("/minserve/handlers/socket_hops.py", "receive"),
    ("/minserve/handlers/group_hops.py", "wait"),
    ("/minserve/handlers/backlog.py", "wait"),
)
# Where several batches are under way each has a thread, and one of them has its turn: the others pause, one of them at a
# collective that nobody holds up.
_BATCH = ("/minserve/rank/loop.py", "_run_batch")
_PAUSE = ("/minserve/rank/overlap.py", "await_result")


@dataclass(frozen=True, slots=True)
class Stack:
    """The stacks of one rank's threads, as faulthandler wrote them."""

    text: str

    @property
    def collective(self) -> bool:
        """Whether a thread is inside torch.distributed, or waits for another stage."""
        threads = self._threads()
        in_torch = any(_COLLECTIVES in file for frames in threads for file, _, _ in frames)
        return in_torch or any(_passes(frames, call) for frames in threads for call in _HOPS)

    def __str__(self) -> str:
        """Where the batch is, in words: the last place in code that the model's author knows."""
        threads = self._threads()
        if not threads:
            return "somewhere that its stack does not tell"
        frames = next((frames for frames in threads if _passes(frames, _BATCH)), threads[-1])
        known = (frame for frame in frames if not any(part in frame[0] for part in _INSTALLED))
        file, line, function = next(known, frames[0])
        return f"at {os.path.basename(file)}:{line} in {function}"

    def _threads(self) -> list[list[tuple[str, str, str]]]:
        """File, line and function of each call of each thread, without batches that pause while another has its turn."""
        threads = list(filter(None, map(_FRAME.findall, _THREAD.split(self.text))))
        at_work = [frames for frames in threads if _passes(frames, _BATCH) and not _passes(frames, _PAUSE)]
        return [frames for frames in threads if not (at_work and _passes(frames, _PAUSE))]


def _passes(frames: list[tuple[str, str, str]], call: tuple[str, str]) -> bool:
    """Whether a thread is in this function of this file, or in what it has called."""
    return any(file.endswith(call[0]) and function == call[1] for file, _, function in frames)


async def ask(directory: Path, pids: Mapping[int, int]) -> dict[int, Stack]:
    """The stacks of these ranks, by rank: those that have written theirs within a second.

    Args:
        directory: where the ranks' stack files are.
        pids: of each rank.
    """
    files = {rank: StackFile(directory, rank) for rank in pids}
    asked = {rank for rank, pid in pids.items() if files[rank].ask(pid)}
    waiting = {
        rank for rank in asked if process_state(pids[rank]) not in STOPPED
    }  # which writes nothing until it goes on
    deadline = asyncio.get_running_loop().time() + ASK_S
    while waiting and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(LOOK_S)
        waiting = {rank for rank in waiting if not files[rank].settled()}
    texts = {rank: files[rank].text() for rank in sorted(asked)}
    return {rank: Stack(text) for rank, text in texts.items() if text}
