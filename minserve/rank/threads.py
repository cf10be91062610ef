"""The threads that a handler starts in a batch: a cancelled one is over only when they are.

A thread that generates may still be in the middle of a collective when the stream that it feeds is cancelled. The next
batch's collectives, from the main thread, would pair up with it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import FrameType

# The names of minserve's own threads: those that run batches beside each other, and what sends a pipeline's activations.
BATCH_THREAD, HOP_THREAD = "minserve-batch", "minserve-hop"
LOOK_S = 0.01
STILL_LOOKS = 5
# Where a thread stands that does nothing until another one tells it to: it waits for an event, a queue or a thread's end, or
# is a pool's idle worker. Such threads are often started in a batch and kept for good. The functions count, for in `run` of
# these files stands a thread that was given something written in C to do, perhaps the wait for a collective.
_WAITING_IN = {
    ("threading.py", "wait"),
    ("threading.py", "_wait_for_tstate_lock"),
    ("threading.py", "join"),  # from Python 3.13 on
    ("concurrent/futures/thread.py", "_worker"),
}
# A thread of torch's, started with the first compilation, that never ends. It works for nobody's stream.
_APART = ("/torch/_inductor/compile_worker/subproc_pool.py",)
_STDLIB = os.path.dirname(threading.__file__) + os.sep
_LIBRARIES = ("/site-packages/", "/dist-packages/")
# A thread that waits in here for its grant is about to be told that it gets none.
_OURS = "/minserve/rank/inbox.py"


def alive() -> list[threading.Thread]:
    """The threads there are."""
    return threading.enumerate()


def wait_for_end(others: Collection[threading.Thread]) -> None:
    """Waits until every thread that is not among `others` has ended, or only waits for somebody.

    Without a limit of its own: the server watches this rank, and ends it when the batch takes too long.
    """
    before: dict[threading.Thread, tuple[FrameType, int] | None] = {}
    still = 0
    while True:
        places = _places(others)
        if not places:
            return
        # Threads that work together wait for each other, too, but not for long.
        still = still + 1 if places == before and all(map(_only_waits, places.values())) else 0
        if still == STILL_LOOKS:
            return
        before = places
        time.sleep(LOOK_S)  # there is no event for "it waits"


def _places(others: Collection[threading.Thread]) -> dict[threading.Thread, tuple[FrameType, int] | None]:
    """Where each other thread is: its innermost call and the instruction there; None for one that is about to begin."""
    frames = sys._current_frames()
    places: dict[threading.Thread, tuple[FrameType, int] | None] = {}
    for thread in threading.enumerate():
        if thread in others or thread.name in (BATCH_THREAD, HOP_THREAD):
            continue
        if thread.ident is None:
            places[thread] = None
        elif (frame := frames.get(thread.ident)) is not None and not _is_a_librarys(frame):
            places[thread] = frame, frame.f_lasti
    return places


def _only_waits(place: tuple[FrameType, int] | None) -> bool:
    """Whether it does nothing until another thread tells it to: one that waits with a time limit goes on by itself."""
    if place is None:
        return False
    frame, _ = place
    at_rest = any(
        frame.f_code.co_name == name and frame.f_code.co_filename.endswith(f"/{file}") for file, name in _WAITING_IN
    )
    return at_rest and frame.f_locals.get("timeout") in (None, -1) and not _passes(frame, _OURS)


def _is_a_librarys(frame: FrameType) -> bool:
    """Whether a thread is at a library's own affairs (a progress bar's monitor, an exporter of metrics), which never end.

    That is: in code of an installed package, and neither in torch, which issues the collectives, nor in the handler's own.
    """
    files = _files(frame)
    if any(file.endswith(_APART) for file in files):
        return True
    installed = [file for file in files if any(part in file for part in _LIBRARIES)]
    own = [file for file in files if file not in installed and not file.startswith((_STDLIB, "<frozen "))]
    return bool(installed) and not own and not any("/torch/" in file for file in installed)


def _passes(frame: FrameType, file: str) -> bool:
    """Whether a call or one of its callers is in this file."""
    return any(name.endswith(file) for name in _files(frame))


def _files(frame: FrameType) -> list[str]:
    files = []
    caller: FrameType | None = frame
    while caller is not None:
        files.append(caller.f_code.co_filename)
        caller = caller.f_back
    return files


def ignore_cancelled(cancelled: type[BaseException]) -> None:
    """Lets a thread that a cancel ends go without a traceback on stderr: nothing is wrong."""
    report = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not issubclass(arguments.exc_type, cancelled):
            report(arguments)

    threading.excepthook = hook
