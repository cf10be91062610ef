"""Orphans: whatever a rank has started and left behind becomes this server's child, not init's, and is reaped here."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal

from minserve.worker.processes import children, has_ended

logger = logging.getLogger(__name__)

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
UNCLAIMED_S = 1.0


class Reaper:
    """Adopts the orphans among this process's descendants, as PID 1 of a container does anyway, and reaps them.

    Adopted, they can be found and killed with their rank group (`processes.kill_leftovers`). Never `waitpid(-1)`: it would
    take from `subprocess` the exit status of a child that somebody waits for. Those are reaped at once when they end, so a
    child that ended and is still there `UNCLAIMED_S` later, after the loop has polled, is nobody's.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            logger.warning("orphans of ranks cannot be adopted: %s", os.strerror(ctypes.get_errno()))
        # uvloop's add_signal_handler refuses SIGCHLD.
        signal.signal(signal.SIGCHLD, lambda *_: self._loop.call_soon_threadsafe(self._child_ended))

    def close(self) -> None:
        """Stops; whoever adopts this process's children next must do it."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self._timer is not None:
            self._timer.cancel()
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def _child_ended(self) -> None:
        """The signal tells of one child or of many; the first starts the rounds, which go on while any is left."""
        if self._timer is None:
            self._timer = self._loop.call_later(UNCLAIMED_S, self._round)

    def _round(self) -> None:
        ended = {pid for pid in children(os.getpid()) if has_ended(pid)}
        for pid in ended & self._ended:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._ended = ended - self._ended
        self._timer = self._loop.call_later(UNCLAIMED_S, self._round) if self._ended else None
