"""Pipelines of the package torchpippy, as the `pippy` key of the model's YAML describes them."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import rpc

if TYPE_CHECKING:
    from minserve.rank.context import Context

logger = logging.getLogger(__name__)


def initialize_rpc_workers(local_rank: int, world_size: int, ctx: Context) -> None:
    """Joins torch's RPC as `worker<rank>`, each with its GPU where there are any. Returns once all ranks have.

    The YAML's `pippy` says `rpc_timeout` (s) and `num_worker_threads`; what it leaves out is as in torch.
    """
    known = ("rpc_timeout", "num_worker_threads")
    given: Any = ctx.model_yaml_config.get("pippy") or {}
    options = rpc.TensorPipeRpcBackendOptions(**{key: given[key] for key in known if key in given})
    devices = torch.cuda.device_count()
    if devices:
        for rank in range(world_size):
            options.set_device_map(f"worker{rank}", {local_rank % devices: rank % devices})
    # RPC unpickles what it reads, so it must listen where the other collectives do: on one machine not to the outside.
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface:
        os.environ.setdefault("TP_SOCKET_IFNAME", interface)
    logger.info("rank %d of %d joins RPC with pid %d", local_rank, world_size, os.getpid())
    join: Any = rpc.init_rpc  # torch has no types for it
    join(f"worker{local_rank}", rank=local_rank, world_size=world_size, rpc_backend_options=options)


def get_pipeline_driver(model: Any, world_size: int, ctx: Context) -> Any:
    """Splits a model over the ranks.

    The YAML's `pippy` says `input_names` and `model_type` ("HF" for a Hugging Face model) and perhaps `chunks` (1);
    `handler` says `model_path` and perhaps `index_filename`, of the checkpoint's index in it.

    Returns:
        What runs the pipeline: for a Hugging Face model the model itself.

    Raises:
        ValueError: the YAML has not what is needed.
        ModuleNotFoundError: torchpippy is not installed.
    """
    pippy_options, handler_options = _section(ctx, "pippy"), _section(ctx, "handler")
    input_names = _needed(pippy_options, "pippy", "input_names")
    hugging_face = _needed(pippy_options, "pippy", "model_type") == "HF"
    model_path = _needed(handler_options, "handler", "model_path")
    index = handler_options.get("index_filename")
    index = None if index is None else os.path.join(model_path, index)
    if index is not None and not os.path.exists(index):
        raise ValueError(f"handler.index_filename: there is no file {index}")
    pippy = _pippy()
    model.eval()
    parameters = inspect.signature(model.forward).parameters.values()
    fixed = {one.name: one.default for one in parameters if one.name not in input_names}
    if hugging_face and "bloom" in str(type(model)):
        fixed.setdefault("deprecated_arguments", {})
    helpers = importlib.import_module("pippy.hf") if hugging_face else None
    driver, _ = pippy.all_compile(
        model,
        num_ranks=world_size,
        num_chunks=pippy_options.get("chunks", 1),
        schedule="FillDrain",
        split_policy=pippy.split_into_equal_size(world_size),
        tracer=helpers.PiPPyHFTracer() if helpers is not None else None,
        concrete_args=fixed,
        index_filename=index,
        checkpoint_prefix=None,
    )
    if helpers is None:
        return driver
    helpers.inject_pipeline_forward(model, driver)
    return model


def _section(ctx: Context, name: str) -> dict[str, Any]:
    section = ctx.model_yaml_config.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"Missing {name!r} key in YAML config")
    return section


def _needed(section: dict[str, Any], name: str, key: str) -> Any:
    if key not in section:
        raise ValueError(f"Missing {key!r} key in {name!r} of the YAML config")
    return section[key]


def _pippy() -> Any:
    try:
        pippy = importlib.import_module("pippy")
    except ModuleNotFoundError as error:
        if error.name != "pippy":
            raise
        raise ModuleNotFoundError(
            "pipelines of ts.handler_utils need the package torchpippy 0.1: add it to the model's requirements.txt",
            name="pippy",
        ) from None
    if not hasattr(pippy, "all_compile"):
        raise ImportError("pipelines of ts.handler_utils need torchpippy 0.1: later ones have no all_compile")
    return pippy
