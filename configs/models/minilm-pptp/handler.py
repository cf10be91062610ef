"""MiniLM as a pipeline of stages, with each layer split over the ranks of its stage."""

from __future__ import annotations

from typing import Any

from minilm import LAYERS, EmbeddingHandler, Encoder
from torch import Tensor

from minserve.handlers import Pipeline, TensorParallel, build_mesh


class MiniLM(EmbeddingHandler):
    def load(self, context: Any) -> None:
        super().load(context)
        mesh = build_mesh(self.device, tp=context.model_yaml_config["handler"]["tp"])
        self.pipeline = Pipeline(self.device, mesh)
        tp = TensorParallel.over(mesh.get_group("tp"))
        self.encoder = Encoder(self.device, self.pipeline.share(LAYERS), tp)

    def inference(self, inputs: tuple[Tensor, Tensor]) -> Any:
        return self.pipeline.run(self.encoder, *inputs)
