"""Eight equal layers, dealt out to the ranks of a pipeline; in one process all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minserve.handlers import BaseHandler, Pipeline

LAYERS = 8
WIDTH = 512
ROWS = 64
SEED = 6


class Stages(BaseHandler):
    """A request's body is not looked at: every request is the same work."""

    def load(self, context: Any) -> None:
        """The same weights on every rank, of which it keeps its share; `layers` in the configuration: of fewer of them."""
        layers = context.model_yaml_config.get("handler", {}).get("layers", LAYERS)
        torch.manual_seed(SEED)
        weights = torch.randn(LAYERS, WIDTH, WIDTH) / WIDTH**0.5
        self.input = torch.randn(ROWS, WIDTH)
        self.pipeline = Pipeline(self.device)
        self.layers = [weights[index] for index in self.pipeline.share(layers)]

    def preprocess(self, data: list[dict[str, Any]]) -> Tensor:
        """So many rows for each request."""
        self.count = len(data)
        return self.input.repeat(self.count, 1)

    def inference(self, rows: Tensor) -> Any:
        """Through all stages; None on all ranks but the first."""
        return self.pipeline.run(self.stage, rows)

    def stage(self, rows: Tensor) -> Tensor:
        """This rank's layers."""
        for weight in self.layers:
            rows = torch.tanh(rows @ weight)
        return rows

    def postprocess(self, outputs: tuple[Tensor]) -> list[object]:
        """One number for each request, the same for all."""
        return [f"{part.sum():.2f}" for part in outputs[0].chunk(self.count)]
