"""`--reload`: reloads a model when a file of its directory changes. For development."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from minserve.errors import Draining, MinServeError
from minserve.worker.fingerprint import read_fingerprint

if TYPE_CHECKING:
    from pathlib import Path

    from minserve.registry.models import Registry

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at a directory


async def watch(registry: Registry) -> None:
    """Watches the directories of all models, those with a wrong configuration too, until it is cancelled."""
    names = {model.spec.name for model in registry.models()} | registry.broken.keys()
    async with asyncio.TaskGroup() as group:
        for name in sorted(names):
            try:
                directory = registry.location(name).path
            except MinServeError as error:
                logger.error("%s is not watched: %s", name, error)
            else:
                group.create_task(_watch(registry, name, directory))


async def _watch(registry: Registry, name: str, directory: Path) -> None:
    """A change counts once the directory looks the same twice: an editor or a copy may be in the middle of it."""
    served = before = await read_fingerprint(directory)
    logger.info("%s: reloads when a file in %s changes", name, directory)
    while True:
        await asyncio.sleep(LOOK_S)
        now = await read_fingerprint(directory)
        if now == before and now != served:
            served = now
            await _reload(registry, name)
        before = now


async def _reload(registry: Registry, name: str) -> None:
    logger.info("%s: a file has changed", name)
    try:
        await registry.reload(name)
    except Draining:
        return
    except MinServeError as error:
        logger.error("%s: not reloaded: %s", name, error)
    except Exception:
        logger.exception("%s: not reloaded", name)
