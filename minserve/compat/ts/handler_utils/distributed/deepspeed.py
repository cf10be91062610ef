"""DeepSpeed's inference engine, as the `deepspeed` key of the model's YAML describes it."""

from __future__ import annotations

import importlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minserve.rank.context import Context

logger = logging.getLogger(__name__)


def create_checkpoints_json(model_path: str | os.PathLike[str], checkpoints_json: str | os.PathLike[str]) -> None:
    """Writes DeepSpeed's list of the weight files (.bin and .pt) that lie in or below a folder."""
    files = sorted(
        str(path) for path in Path(model_path).rglob("*") if path.suffix in (".bin", ".pt") and path.is_file()
    )
    logger.info("writing DeepSpeed's list of %d checkpoint files to %s", len(files), checkpoints_json)
    # Each rank writes it: another one must never read half of it.
    unfinished = f"{checkpoints_json}.{os.getpid()}"
    Path(unfinished).write_text(json.dumps({"type": "ds_model", "checkpoints": files, "version": 1.0}))
    os.replace(unfinished, checkpoints_json)


def get_ds_engine(model: Any, ctx: Context) -> Any:
    """DeepSpeed's engine for a model.

    The YAML's `handler` says `model_path`; `deepspeed` may say `config`, DeepSpeed's own file, and `checkpoint`, the name of
    the list of weight files that is written here. Both are in the model directory.

    Raises:
        ValueError: the YAML has not what is needed, or names a file that is not there.
        ModuleNotFoundError: deepspeed is not installed.
    """
    options: Any = ctx.model_yaml_config.get("deepspeed")
    if not isinstance(options, dict):
        raise ValueError(f"{ctx.model_name} has no deepspeed config in model config yaml file")
    handler_options: Any = ctx.model_yaml_config.get("handler")
    if not isinstance(handler_options, dict) or "model_path" not in handler_options:
        raise ValueError(f"{ctx.model_name} has no handler.model_path in model config yaml file")
    model_path = handler_options["model_path"]
    model_dir = str(ctx.system_properties["model_dir"])
    config, checkpoint = (
        os.path.join(model_dir, options[key]) if key in options else None for key in ("config", "checkpoint")
    )
    if config is not None and not os.path.exists(config):
        raise ValueError(f"{ctx.model_name} has no deepspeed config file {config}")
    engine = _deepspeed()
    if checkpoint is not None:
        create_checkpoints_json(model_path, checkpoint)
    return engine.init_inference(model, config=config, base_dir=model_path, checkpoint=checkpoint)


def _deepspeed() -> Any:
    try:
        return importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ModuleNotFoundError(
            "get_ds_engine needs the package deepspeed: add it to the model's requirements.txt", name="deepspeed"
        ) from None
