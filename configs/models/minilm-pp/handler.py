"""MiniLM as a pipeline: each rank holds some of the layers, rank 0 gets the result."""

from __future__ import annotations

from typing import Any

from minilm import LAYERS, EmbeddingHandler, Encoder
from torch import Tensor

from minserve.handlers import Pipeline


class MiniLM(EmbeddingHandler):
    def load(self, context: Any) -> None:
        super().load(context)
        self.pipeline = Pipeline(self.device)
        self.encoder = Encoder(self.device, layers=self.pipeline.share(LAYERS))

    def inference(self, inputs: tuple[Tensor, Tensor]) -> Any:
        return self.pipeline.run(self.encoder, *inputs)
