"""A handler of older archives: tensors in, a tensor out."""

from __future__ import annotations

import io
import os
import time
from typing import TYPE_CHECKING, Any

import torch

from ..utils.util import list_classes_from_module
from . import model_files

if TYPE_CHECKING:
    from minserve.rank.context import Context

__all__ = ["DenseNetHandler", "list_classes_from_module"]


class DenseNetHandler:
    """Takes what torch.save has written of one tensor a request, and answers with the model's output, saved likewise.

    Attributes are those of `BaseHandler`.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.device: Any = None
        self.initialized = False
        self.context: Any = None
        self.manifest: Any = None
        self.map_location: str | None = None

    def initialize(self, context: Context) -> None:
        """Loads the model: the class in `modelFile` with its weights, or else TorchScript.

        Raises:
            RuntimeError: a file is missing.
        """
        properties: Any = context.system_properties
        self.manifest = context.manifest
        self.map_location, self.device = model_files.choose_device(properties.get("gpu_id"))
        model_dir = str(properties.get("model_dir"))
        files = self.manifest["model"]
        path = os.path.join(model_dir, files["serializedFile"])
        if not os.path.isfile(path):
            raise RuntimeError(f"Missing the {files['serializedFile']} file: {path}")
        if files.get("modelFile"):
            self.model = model_files.load_eager(model_dir, files["modelFile"], path, self.device)
        else:
            self.model = model_files.load_torchscript(path, self.device)
        self.model.to(self.device)
        self.model.eval()
        self.initialized = True

    def inference(self, data: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the model without autograd."""
        with torch.no_grad():
            return self.model(data.to(self.device), *args, **kwargs)

    def handle(self, data: list[dict[str, Any]], context: Context) -> list[torch.Tensor]:
        """Answers each request with its share of the output, which keeps its first dimension."""
        began = time.perf_counter()
        self.context = context
        # A client's bytes: weights_only, for a pickle could run anything.
        tensors = [torch.load(io.BytesIO(row.get("data") or row["body"]), weights_only=True) for row in data]
        output = self.inference(torch.stack(tensors))
        context.metrics.add_time("HandlerTime", round((time.perf_counter() - began) * 1000, 2), None, "ms")
        # A copy of each: saved, a view would bring the whole batch along.
        return [output[place : place + 1].clone() for place in range(len(data))]
