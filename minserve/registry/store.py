"""The model store: which model directories there are, and which of them a start is to serve."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minserve.config.model import CONFIG_FILE
from minserve.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Location:
    """A model directory and the name to serve it under; None: the folder's."""

    path: Path
    name: str | None = None


def locate(store: Path, wanted: Sequence[str]) -> list[Location]:
    """The model directories to serve.

    Args:
        store: the model store.
        wanted: `all`, or `[NAME=]LOCATION` with a folder of the store or a path.

    Raises:
        StartupError: the store or a location is not there.
    """
    if not store.is_dir():
        raise StartupError(f"model store {store}: no such directory")
    if _is_model(store):
        raise StartupError(f"model store {store} is itself a model directory; give the folder that holds it")
    locations: list[Location] = []
    for item in wanted:
        if item.lower() == "all":
            locations += _all(store)
        else:
            name, _, location = item.rpartition("=")
            path = store / location  # an absolute location stands for itself
            if not path.is_dir():
                raise StartupError(f"model {item}: no directory {path}")
            locations.append(Location(Path(os.path.abspath(path)), name or None))
    return locations


def _is_model(path: Path) -> bool:
    return (path / CONFIG_FILE).exists() or (path / "handler.py").exists()


def _all(store: Path) -> list[Location]:
    """Every folder of the store that looks like a model directory, by name."""
    locations = []
    for path in sorted(store.iterdir()):
        if not path.is_dir() or path.name.startswith((".", "__")):
            continue
        if _is_model(path):
            locations.append(Location(Path(os.path.abspath(path))))
        else:
            logger.warning("%s: skipped, it has neither a %s nor a handler.py", path, CONFIG_FILE)
    return locations
