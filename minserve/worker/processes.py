"""Processes by pidfd: when one ends, how it ended, and how to be rid of it and of everything it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Watch:
    """Tells the end of a process, also of one that is not our child.

    Args:
        on_exit: called once, with the exit code as `subprocess` gives it, None when nobody could read it.
    """

    def __init__(self, pid: int, on_exit: Callable[[int | None], None]) -> None:
        self.pid = pid
        self.ended = asyncio.Event()
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._fd = -1
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._loop.call_soon(self._end, None)
        else:
            self._loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Stops watching."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _readable(self) -> None:
        code = exit_code(self.pid)
        self.close()
        self._end(code)

    def _end(self, code: int | None) -> None:
        self.ended.set()
        self._on_exit(code)


def exit_code(pid: int) -> int | None:
    """How a process ended that its parent has not reaped yet; None when it is too late.

    Field 52 of /proc/<pid>/stat (proc(5)) is the status as `waitpid` gives it.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    fields = text.rpartition(")")[2].split()  # the name in field 2 may hold spaces; field 3 is the first here
    try:
        if fields[0] not in ("Z", "X"):
            return None
        return os.waitstatus_to_exitcode(int(fields[49]))
    except (IndexError, ValueError):
        return None


def kill_tree(agent: int, ranks: Iterable[int]) -> None:
    """SIGKILLs each rank's process group, then the agent's.

    torchrun makes every rank the leader of its own session, so a rank's helpers (compilers, data workers) are in its group.
    Ranks that have not said HELLO yet are found as the agent's children.
    """
    groups = set(ranks)
    with contextlib.suppress(psutil.Error):
        groups |= {child.pid for child in psutil.Process(agent).children(recursive=True)}
    for pid in [*groups, agent]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
