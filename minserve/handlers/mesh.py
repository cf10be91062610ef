"""The 2-D device mesh of `parallelType: pptp`: pipeline stages, each of them split by tensor parallelism."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def build_mesh(device: torch.device, tp: int) -> DeviceMesh:
    """Lays all ranks out as `(pp, tp)`: ranks of one stage are neighbours, for they talk most.

    Four ranks with tp = 2: stage 0 is ranks 0 and 1, stage 1 ranks 2 and 3. `mesh.get_group("tp")` is this rank's
    stage, `mesh.get_group("pp")` its column through the stages. A collective call: every rank makes it.

    Args:
        device: this rank's device; it decides between NCCL and gloo.
        tp: ranks in a stage.

    Raises:
        ValueError: the world size is no multiple of `tp`.
    """
    world = dist.get_world_size()
    if tp < 1 or world % tp:
        raise ValueError(f"{world} ranks cannot be split into stages of {tp}: nproc-per-node must be a multiple of tp")
    return init_device_mesh(device.type, (world // tp, tp), mesh_dim_names=("pp", "tp"))
