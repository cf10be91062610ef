"""MiniLM sentence embeddings in one process. What a request looks like: see EmbeddingHandler."""

from __future__ import annotations

from typing import Any

from minilm import EmbeddingHandler, Encoder
from torch import Tensor


class MiniLM(EmbeddingHandler):
    def load(self, context: Any) -> None:
        super().load(context)
        self.encoder = Encoder(self.device)

    def inference(self, inputs: tuple[Tensor, Tensor]) -> Any:
        return self.encoder(*inputs)
