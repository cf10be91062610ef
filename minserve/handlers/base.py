"""The base of a handler: device and process group are set up, the author writes the model part."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from minserve.rank.context import Context


class BaseHandler:
    """A handler that runs on one rank or on many: write `load`, `preprocess`, `inference` and `postprocess`.

    Every rank gets every request, in the same order, and calls the four methods in the same order. What rank 0's
    `postprocess` returns is sent to the clients.

    Attributes:
        rank: this process in the group, 0 … world_size - 1.
        local_rank: this process on its machine; the index of its GPU among the visible ones.
        world_size: number of processes in the group; 1 without parallelism.
        device: `cuda:<local_rank>` where there are GPUs and `deviceType` is not `cpu`, else `cpu`.
        context: set before `load` and for each batch: request headers in, status and headers of each answer out.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    context: Context

    def initialize(self, context: Context) -> None:
        """Sets the attributes, joins the process group, then calls `load`. minserve calls it once.

        Raises:
            RuntimeError: fewer GPUs are visible than this rank needs.
        """
        self.context = context
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = self._choose_device(str(context.model_yaml_config.get("deviceType", "")))
        if self.world_size > 1 and not dist.is_initialized():
            self._join_group()
        self.load(context)

    def load(self, context: Context) -> None:
        """Builds the model on `self.device`. Call `minserve.report_progress` between weight files."""

    def handle(self, data: list[dict[str, Any]], context: Context) -> Iterable[object] | None:
        """Takes a batch through preprocess, inference and postprocess, without autograd.

        Args:
            data: one dict per request: `{"body": X}`, with X decoded by content type (JSON → object, text → str,
                anything else → bytearray), or the fields of a form.
            context: of this batch.

        Returns:
            One answer per request, or None where `inference` returned None: a pipeline rank that has no result.
        """
        self.context = context
        with torch.inference_mode():
            outputs = self.inference(self.preprocess(data))
            return None if outputs is None else self.postprocess(outputs)

    def preprocess(self, data: list[dict[str, Any]]) -> Any:
        """Turns the requests into what `inference` takes. Must give the same result on every rank."""
        return data

    def inference(self, inputs: Any) -> Any:
        """Runs the model. None means that this rank has no result, and ends the batch here without `postprocess`."""
        raise NotImplementedError(f"{type(self).__name__} has no inference(self, inputs)")

    def postprocess(self, outputs: Any) -> list[object]:
        """Turns the outputs into one answer per request: str, bytes or anything that JSON can say."""
        return list(outputs)

    def close(self) -> None:
        """Leaves the process group. minserve calls it on every rank at shutdown."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _choose_device(self, device_type: str) -> torch.device:
        if device_type.lower() == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        visible = torch.cuda.device_count()
        if self.local_rank >= visible:
            raise RuntimeError(
                f"rank {self.rank} needs GPU {self.local_rank} and only {visible} can be seen: "
                "lower nproc-per-node, or set deviceType: cpu"
            )
        return torch.device("cuda", self.local_rank)

    def _join_group(self) -> None:
        """Joins the group that torchrun's environment describes."""
        if self.device.type == "cpu":
            dist.init_process_group("gloo")
            return
        # First the device, then the group: object collectives pickle to the current device, and all ranks but the first
        # would otherwise put their buffers (and a CUDA context of some 500 MB) on GPU 0.
        torch.cuda.set_device(self.device)
        dist.init_process_group("nccl", device_id=self.device)
