"""Answers any request with a list of what each rank sees, rank 0 first.

For example:
    [{"RANK": "0", "LOCAL_RANK": "0", …, "pid": 4711, "device": "cpu"}, {"RANK": "1", …}]
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from minserve.handlers import BaseHandler

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")


class WhoAmI(BaseHandler):
    def inference(self, data: list[dict[str, Any]]) -> list[object]:
        me = {name: os.environ.get(name) for name in NAMES} | {"pid": os.getpid(), "device": str(self.device)}
        everyone: list[object] = [None] * self.world_size
        dist.all_gather_object(everyone, me)
        return [everyone] * len(data)
