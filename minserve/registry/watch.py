"""`--reload`: reloads a model when a file of its directory changes. For development."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from minserve.errors import Draining, MinServeError
from minserve.registry.archive import is_archive
from minserve.worker.fingerprint import read_fingerprint

if TYPE_CHECKING:
    from pathlib import Path

    from minserve.registry.models import Registry

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at a directory


async def watch(registry: Registry) -> None:
    """Watches the folders and archives of all models, those with a wrong configuration too, until it is cancelled.

    Models that are registered later are not watched.
    """
    watched: list[tuple[str, str | None]] = [(model.spec.name, model.spec.version) for model in registry.models()]
    served = {name for name, _ in watched}
    watched += [(name, None) for name in sorted(registry.broken.keys() - served)]
    async with asyncio.TaskGroup() as group:
        for name, version in watched:
            try:
                path = registry.location(name, version).path
            except MinServeError as error:
                logger.error("%s is not watched: %s", name, error)
            else:
                group.create_task(_watch(registry, name, version, path))


async def _watch(registry: Registry, name: str, version: str | None, path: Path) -> None:
    """A change counts once the files look the same twice: an editor or a copy may be in the middle of it."""
    served = before = await read_fingerprint(path)
    logger.info("%s: reloads when %s changes", name, path if is_archive(path) else f"a file in {path}")
    while True:
        await asyncio.sleep(LOOK_S)
        now = await read_fingerprint(path)
        if now == before and now != served:
            served = now
            await _reload(registry, name, version)
        before = now


async def _reload(registry: Registry, name: str, version: str | None) -> None:
    logger.info("%s: a file has changed", name)
    try:
        await registry.reload(name, version)
    except Draining:
        return
    except MinServeError as error:
        logger.error("%s: not reloaded: %s", name, error)
    except Exception:
        logger.exception("%s: not reloaded", name)
