"""Batches in pieces, timed, compiled: what the examples of TorchServe have in their YAML."""

import torch
from ts.handler_utils.micro_batching import MicroBatching
from ts.handler_utils.timer import timed
from ts.torch_handler.base_handler import BaseHandler


class Pieces(BaseHandler):
    """Three numbers to two."""

    def __init__(self):
        super().__init__()
        self.handle = MicroBatching(self)

    def initialize(self, context):
        """Sets the pieces up as the YAML has them."""
        super().initialize(context)
        config = context.model_yaml_config["micro_batching"]
        self.handle.micro_batch_size = config["micro_batch_size"]
        self.handle.parallelism = config["parallelism"]

    @timed
    def preprocess(self, data):
        """JSON lists to a tensor."""
        return torch.tensor([row["body"] for row in data], dtype=torch.float32)

    @timed
    def inference(self, data):
        """Also how many were in the piece."""
        return super().inference(data), len(data)

    @timed
    def postprocess(self, data):
        """Rounded."""
        rows, count = data
        return [{"of": count, "row": [round(value, 3) for value in row]} for row in rows.tolist()]
