"""A rank's Python stacks: asked for with a signal, written into a file by faulthandler (rank/vitals.py), and read.

faulthandler needs neither the GIL nor the rank's main thread, so also a rank that hangs in C tells where it was called from.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path

from minserve.wire.board import STACK_SIGNAL

SETTLED_LOOKS = 4  # without growth, 20 ms apart: it is written in small pieces, and the main thread's comes last
MAX_BYTES = 64 * 1024
# Below the rank's own beginning is what has brought it about: runpy, and in a fork the agent, which is in torch.distributed.
_BEGINNING = re.compile(r'(/minserve/rank/__main__\.py", line \d+ in main)\n(?:  File .*\n?)+')
# minserve's own threads in a rank say nothing about a handler.
_OURS = re.compile(r"/minserve/rank/(?:vitals\.py\", line \d+ in _beat|process\.py\", line \d+ in watch)")


class StackFile:
    """One rank's file, from where it ended when its stacks were asked for.

    Args:
        directory: of the rank's incarnation.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._path = directory / f"stack.{rank}"
        self._begin = self._size = self._length()
        self._looks = 0

    def ask(self, pid: int) -> bool:
        """Asks a rank to write; False if it would not, or the signal would end it: it has no handler for that."""
        if not self._path.exists() or not _listens(pid):
            return False
        _signal_main_thread(pid)
        return True

    def settled(self) -> bool:
        """Whether it has been written: it has grown, and then has not for a few calls of this."""
        size = self._length()
        self._looks = self._looks + 1 if size == self._size else 0
        self._size = size
        return size > self._begin and self._looks >= SETTLED_LOOKS

    def text(self) -> str:
        """What has come: the stacks of the handler's threads, newest call first, the main thread last. Empty for nothing."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._begin)
                written = file.read(MAX_BYTES).decode("utf-8", "replace")
        except OSError:  # the group has ended meanwhile
            return ""
        threads = re.split(r"\n(?=Thread |Current thread )", _BEGINNING.sub(r"\1\n", written))
        return "\n\n".join(thread.strip() for thread in threads if not _OURS.search(thread)).strip()

    def _length(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0


def _signal_main_thread(pid: int) -> None:
    """Any other thread would read the main thread's frames while that runs, which ends the process with SIGSEGV.

    A signal to the process is the main thread's as a rule, but not when a stopped process goes on: then it is whose turn
    comes first.
    """
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if tgkill is not None:
        tgkill(pid, pid, int(STACK_SIGNAL))  # of one that has gone it only says so
        return
    with contextlib.suppress(ProcessLookupError):  # glibc before 2.30
        os.kill(pid, STACK_SIGNAL)


def _listens(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (STACK_SIGNAL - 1) & 1)
