"""Which threads of a rank take the core from whoever runs there, the moment they wake up.

Linux lets all of them, and gloo gets in its own way. Its loop thread, woken by the other rank's answer, often puts off the
very thread that has just sent and still holds the connection's lock; then it tries for that lock, over and over, until the
other has found a core. So loop threads wait for a free core or for their turn (SCHED_BATCH), as ranks do altogether if
`scheduling: batch` says so.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

GLOO_LOOP = "gloo_tcp_loop"  # as gloo calls it
TASKS = Path("/proc/self/task")


def wait_for_cores() -> None:
    """From now on no thread that this one starts, nor itself, takes a core from anybody."""
    _wait_for_core(0)


def let_gloo_wait_for_cores() -> None:
    """The loop threads of the process groups there are take no core from anybody."""
    for task in TASKS.iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            if (task / "comm").read_text().rstrip() == GLOO_LOOP:
                _wait_for_core(int(task.name))


def _wait_for_core(thread: int) -> None:
    # A sandbox may forbid it, which costs nothing but the time; a policy that somebody has chosen stays.
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(thread) == os.SCHED_OTHER:
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
