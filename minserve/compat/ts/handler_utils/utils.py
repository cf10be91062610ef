"""Streaming, and classes by name, with TorchServe's names and signatures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from minserve.rank.streaming import stream_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from minserve.rank.context import Context


def send_intermediate_predict_response(
    ret: Sequence[object],
    req_id_map: Mapping[int, str],
    message: str,
    code: int,
    context: Context | None = None,
) -> None:
    """Sends one chunk to each client of the batch. Call it on every rank; only rank 0's chunks reach the clients.

    Args:
        ret: one chunk for each request in `req_id_map`, None for a request that gets none.
        req_id_map: {index in the batch: request id}, `context.request_ids` or a part of it.
        message, code: TorchServe's; the status of the answer is the one that the context has.
        context: the handler's context.
    """
    stream = stream_of(context)
    if stream is not None:
        stream.send_some(ret, req_id_map)


def import_class(class_name: str, module_prefix: str | None = None) -> Any:
    """The class that a text like `package.module.Class` names.

    Args:
        module_prefix: the package in front of it, which alone is enough where `class_name` has no dot.

    Raises:
        ImportError: there is no such module, it has no such class, or the text names no module.
    """
    module, _, name = (class_name or "").rpartition(".")
    path = ".".join(filter(None, (module_prefix, module)))
    if not name or not path:
        raise ImportError(f"{class_name!r} names no class in a module; it must be like package.module.Class")
    found = getattr(importlib.import_module(path), name, None)
    if found is None:
        raise ImportError(f"there is no class {name} in the module {path}")
    return found
