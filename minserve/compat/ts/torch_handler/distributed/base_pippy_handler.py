"""The base of handlers whose rank 0 drives a pipeline over torch's RPC, with the other ranks as its workers."""

from __future__ import annotations

import contextlib
import os
import re
from abc import ABC
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import rpc

from minserve.rank.failures import StageError, describe

from ...handler_utils.distributed.pt_pippy import initialize_rpc_workers
from ..base_handler import BaseHandler

if TYPE_CHECKING:
    from minserve.rank.context import Context

# How torch tells what a function has raised that was called on another rank. Its traceback follows.
_REMOTE = re.compile(r"(?:\w+: )?On WorkerInfo\(id=(\d+), name=\S*\):\n(.*)")
_LOST = re.compile("RPC ran for more than|tensorpipe")


class BasePippyHandler(BaseHandler, ABC):
    """Sets up the RPC workers. minserve sends each batch to all ranks; here rank 0 alone runs it.

    Attributes:
        local_rank: this rank on its machine.
        world_size: number of ranks.
        device: index of this rank's GPU; "cpu" where there is none.
    """

    local_rank: int
    world_size: int

    def initialize(self, ctx: Context) -> None:
        """Joins the group of RPC workers: every rank must come this far before any goes on."""
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        devices = torch.cuda.device_count()
        self.device = self.local_rank % devices if devices else torch.device("cpu")
        initialize_rpc_workers(self.local_rank, self.world_size, ctx)

    def handle(self, data: Any, context: Context) -> Any:
        """Answers on rank 0; elsewhere it is done at once, for what rank 0 calls there runs in RPC's own threads.

        Raises:
            StageError: an ordinary error, in the form that tells minserve not to wait for it from the others.
            Exception: one after which the ranks cannot go on: the worker restarts.
        """
        if self.local_rank != 0:
            return [b""] * len(data)
        try:
            return super().handle(data, context)
        except Exception as error:
            failure = _rank_0_alone(error)
            if failure is None:
                raise
            raise failure from error

    def close(self) -> None:
        """Leaves the group of RPC workers; minserve calls it on every rank at shutdown."""
        with contextlib.suppress(RuntimeError):  # it never came to join it
            rpc.shutdown(graceful=False)


def _rank_0_alone(error: Exception) -> StageError | None:
    """The error as one of rank 0 alone; None where a rank is lost or stuck, or out of memory."""
    failure = describe(error, 0, 1)
    remote = _REMOTE.match(failure.text)
    if failure.kind in ("memory", "device") or (remote is not None and "CUDA error" in remote[2]):
        return None
    if remote is not None:
        text = f"on rank {remote[1]}: {remote[2]}"
    elif failure.kind == "own" and not _LOST.search(failure.text):
        text = failure.text
    else:
        return None
    return StageError(0, failure.type_name, text, failure.place, failure.needs, failure.status)
