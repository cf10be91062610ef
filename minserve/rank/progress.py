"""How a handler tells what it is doing while it loads: `minserve.report_progress("weights", 3, 12)`.

The server shows the latest report of each rank in `/models/{model}`, in the log and on the terminal of `minserve start`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_listener: Callable[[str, int, int], None] | None = None


def report_progress(stage: str, done: int = 0, total: int = 0) -> None:
    """Tells the server how far this rank's load is. Cheap enough for every weight file, not for every tensor.

    Outside a rank (a notebook, a unit test of a handler) it does nothing.

    Args:
        stage: what is going on, in a word or two: "weights", "compiling".
        done: how many of `total` are done.
        total: 0 when the number is not known.
    """
    if _listener is not None:
        _listener(str(stage), int(done), int(total))


def listen(listener: Callable[[str, int, int], None] | None) -> None:
    """Sets who hears the reports. The rank's loop sets it once, before the handler is imported."""
    global _listener  # a process is one rank and has one link; a handler cannot be handed an object at import
    _listener = listener
