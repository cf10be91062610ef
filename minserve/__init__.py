"""minserve: any PyTorch code that runs under torchrun, behind a plain HTTP endpoint.

Handlers use three names from here: `Context`, `Cancelled` and `report_progress`. They are looked up on first use, so that
`import minserve` stays cheap in the server as in the ranks.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minserve.rank.context import Context
    from minserve.rank.progress import report_progress
    from minserve.rank.streaming import Cancelled

__version__ = "0.1.0"
__all__ = ["Cancelled", "Context", "__version__", "report_progress"]

_HOMES = {
    "Cancelled": "minserve.rank.streaming",
    "Context": "minserve.rank.context",
    "report_progress": "minserve.rank.progress",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minserve' has no attribute {name!r}")
