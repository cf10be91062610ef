"""Streaming, with TorchServe's name and signature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.rank.streaming import current

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
    stream = current()
    if stream is not None:
        stream.send_some(ret, req_id_map)
