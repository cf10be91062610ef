"""As a TorchServe user writes it: an intermediate response, then the all-reduced result; or an exception of `ts`."""

import os

import torch
import torch.distributed as dist
from ts.handler_utils.utils import send_intermediate_predict_response
from ts.utils.util import PredictionException


class StreamingHandler:
    def initialize(self, context):
        self.local_rank = int(os.environ["LOCAL_RANK"])
        assert context.system_properties["gpu_id"] is None or context.system_properties["gpu_id"] == self.local_rank
        assert os.environ["OMP_NUM_THREADS"] == "2"
        dist.init_process_group("gloo")
        self.initialized = True

    def handle(self, data, context):
        if data[0]["body"] == b"refuse":
            raise PredictionException("not today", 422)
        send_intermediate_predict_response(["0"], context.request_ids, "Intermediate", 200, context)
        value = torch.tensor([42.0 * (self.local_rank + 1)])
        dist.all_reduce(value)
        context.metrics.add_time("HandlerTime", 1.5)
        return [str(int(value.item()))]
