"""256 chunks of 100 bytes, by the call that TorchServe's handlers use."""

from __future__ import annotations

from typing import Any

from ts.handler_utils.utils import send_intermediate_predict_response  # type: ignore

CHUNK = "x" * 100
CHUNKS = 256


def handle(data: list[dict[str, Any]] | None, context: Any) -> list[str] | None:
    """Called once without data at load."""
    if data is None:
        return None
    chunks = [CHUNK] * len(data)
    for _ in range(CHUNKS - 1):
        send_intermediate_predict_response(chunks, context.request_ids, "chunk", 200, context)
    return chunks
