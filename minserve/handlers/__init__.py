"""What model authors import. `BaseHandler` is all that most need.

The helpers are looked up on first use: `bad_request` then costs no import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minserve.handlers.base import BaseHandler
    from minserve.handlers.mesh import build_mesh
    from minserve.handlers.pipeline import Pipeline
    from minserve.handlers.replies import bad_request
    from minserve.handlers.tensor_parallel import TensorParallel

__all__ = ["BaseHandler", "Pipeline", "TensorParallel", "bad_request", "build_mesh"]

_HOMES = {
    "BaseHandler": "minserve.handlers.base",
    "Pipeline": "minserve.handlers.pipeline",
    "TensorParallel": "minserve.handlers.tensor_parallel",
    "bad_request": "minserve.handlers.replies",
    "build_mesh": "minserve.handlers.mesh",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minserve.handlers' has no attribute {name!r}")
