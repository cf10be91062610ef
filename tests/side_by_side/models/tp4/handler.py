"""Four ranks: an intermediate response, then the all-reduced sum."""

import os

import torch
import torch.distributed as dist
from ts.handler_utils.utils import send_intermediate_predict_response
from ts.torch_handler.base_handler import BaseHandler


class TensorParallel(BaseHandler):
    """Sums a number over the ranks."""

    def initialize(self, context):
        """Joins the process group."""
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        self.rank = int(os.environ["RANK"])
        self.initialized = True

    def handle(self, data, context):
        """The first chunk is the number, the second its sum over the ranks."""
        body = data[0].get("body")
        number = int(body.decode() if isinstance(body, (bytes, bytearray)) else body)
        send_intermediate_predict_response(
            [str(number)], context.request_ids, "Intermediate Prediction success", 200, context
        )
        total = torch.tensor([number * (self.rank + 1)])
        dist.all_reduce(total)
        return [str(int(total.item()))]
