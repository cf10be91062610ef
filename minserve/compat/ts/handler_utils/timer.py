"""`@timed`: how long the steps of a handler take, as metrics, where the model's YAML says `handler: {profile: true}`."""

from __future__ import annotations

import functools
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def timed(func: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a handler whose time becomes the metric `ts_handler_<name>`, in ms.

    What the method has left running on a GPU is waited for and counts.
    """

    @functools.wraps(func)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = getattr(self, "context", None)
        if context is None or not _is_asked_for(context):
            return func(self, *args, **kwargs)
        _wait_for_device()
        began = time.perf_counter()
        result = func(self, *args, **kwargs)
        _wait_for_device()
        context.metrics.add_time(f"ts_handler_{func.__name__}", (time.perf_counter() - began) * 1000)
        return result

    return call


def _is_asked_for(context: Any) -> bool:
    options = context.model_yaml_config.get("handler")
    return isinstance(options, dict) and bool(options.get("profile"))


def _wait_for_device() -> None:
    torch = sys.modules.get("torch")  # a handler that does without needs not pay for its import
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
