"""MiniLM with each layer split over all ranks: every rank computes some of the attention heads and of the MLP."""

from __future__ import annotations

from typing import Any

from minilm import EmbeddingHandler, Encoder
from torch import Tensor

from minserve.handlers import TensorParallel


class MiniLM(EmbeddingHandler):
    def load(self, context: Any) -> None:
        super().load(context)
        self.encoder = Encoder(self.device, tp=TensorParallel.over())

    def inference(self, inputs: tuple[Tensor, Tensor]) -> Any:
        return self.encoder(*inputs)
