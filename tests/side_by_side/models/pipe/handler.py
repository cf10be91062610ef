"""Two ranks that call each other: a pp model as the PiPPy examples have it, with RPC of its own."""

import logging
import os

import torch
import torch.distributed.rpc as rpc
from ts.torch_handler.base_handler import BaseHandler

logger = logging.getLogger(__name__)


def stage(x, factor):
    """Runs on rank 1."""
    return x * factor + int(os.environ["RANK"])


class Pipe(BaseHandler):
    """A number goes to rank 1 and comes back."""

    def initialize(self, context):
        """Every rank joins."""
        rank = int(os.environ["LOCAL_RANK"])
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=context.model_yaml_config["pippy"]["num_worker_threads"],
            rpc_timeout=context.model_yaml_config["pippy"]["rpc_timeout"],
        )
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=int(os.environ["WORLD_SIZE"]), rpc_backend_options=options)
        self.manifest = context.manifest
        self.rank = rank
        logger.info("rank %s has joined", rank)

    def preprocess(self, data):
        """Bodies to a tensor."""
        return torch.tensor([float(row["body"].decode()) for row in data])

    def inference(self, data):
        """Asks rank 1."""
        return rpc.rpc_sync("worker1", stage, args=(data, 10))

    def postprocess(self, data):
        """Text that names the rank that answers."""
        return [f"{value:g} from rank {self.rank}" for value in data.tolist()]
