"""What the tests of workers, registry and frontend share."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from minserve.config.model import MinServeConfig, ModelConfig, ParallelType, TorchrunConfig
from minserve.worker.spec import ModelSpec


def model_config(
    parallel_type: str = "",
    minserve: dict[str, object] | None = None,
    torchrun: dict[str, object] | None = None,
    **keys: object,
) -> ModelConfig:
    """A config by attribute names; what is not given has its default."""
    keys["minserve"] = MinServeConfig.model_validate(minserve or {})
    keys["torchrun"] = TorchrunConfig.model_validate(torchrun or {})
    return ModelConfig.model_validate({"parallel_type": ParallelType(parallel_type), **keys})


def make_spec(
    ranks: int = 1, name: str = "m", model_dir: Path = Path("/models/m"), config: ModelConfig | None = None
) -> ModelSpec:
    """A model whose limits are 10 s for a batch and 20 s for a start."""
    return ModelSpec(
        name=name,
        version="1.0",
        model_dir=model_dir,
        config=config or model_config("tp" if ranks > 1 else ""),
        yaml=b"",
        world_size=ranks,
        response_timeout=10.0,
        startup_timeout=20.0,
        queue_limit=100,
    )


async def until(condition: Callable[[], object]) -> None:
    """Lets the loop run until something has happened; 10 s are a failure."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # it may be anything, so there is no event to wait for
            await asyncio.sleep(0)
