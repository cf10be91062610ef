"""Snapshots: what a server serves, kept after each change of it, so that the next start can go on (torchserve.md 12.1).

A snapshot is a config.properties like any other whose `model_snapshot` lists the models as JSON. The next start of
`minserve torchserve` that is given no configuration takes the newest. All are kept, as TorchServe keeps them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import javaproperties

from minserve.config.keys import LARGEST
from minserve.config.problems import describe_value
from minserve.errors import ConfigError, MinServeError, StartupError
from minserve.registry.archive import is_archive
from minserve.registry.fetching import obtain
from minserve.registry.numbers import MOST_RANKS
from minserve.registry.reading import read_model
from minserve.registry.registration import Registration
from minserve.registry.source import Source
from minserve.registry.store import Location

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from minserve.config.server import ServerOptions
    from minserve.registry.models import Registry
    from minserve.registry.validating import ValidModel
    from minserve.worker.devices import Inventory
    from minserve.worker.runtime import RuntimeDirectory

logger = logging.getLogger(__name__)

KEY = "model_snapshot"
_NAME = re.compile(r"\d{17}-(startup|snapshot|shutdown)\.cfg")


@dataclass(frozen=True, slots=True)
class Entry:
    """One model version of a snapshot."""

    registration: Registration
    version: str
    is_default: bool
    fewest: int
    most: int


def newest(folder: Path) -> Path | None:
    """The newest snapshot of a folder; files of other names are none of ours.

    Raises:
        StartupError: the folder may not be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StartupError(f"{folder}: the snapshots cannot be read: {error.strerror}") from None
    found = max(filter(_NAME.fullmatch, names), default=None)
    return folder / found if found is not None else None


def parse(text: str) -> list[Entry]:
    """The models of a `model_snapshot`.

    Raises:
        StartupError: it is no JSON, or a field is missing or of a wrong kind.
    """
    try:
        models = json.loads(text)["models"]
        return [
            _entry(name, version, values) for name, versions in models.items() for version, values in versions.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StartupError(f"{KEY}: found {describe_value(text)}, allowed: what a snapshot holds: {error!r}") from None


def _entry(name: str, version: str, values: Mapping[str, object]) -> Entry:
    def number(key: str, least: int = 0, most: int = LARGEST) -> int:
        value = values[key]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            allowed = f"an integer from {least} to {most}"
            raise ValueError(f"{name}, version {version}: {key} is {describe_value(value)}, allowed: {allowed}")
        return value

    registration = Registration(
        url=str(values["marName"]),
        name=name,
        batch_size=number("batchSize", least=1),
        max_batch_delay=number("maxBatchDelay"),
        response_timeout=float(number("responseTimeout")),
        startup_timeout=float(number("startupTimeout")) if "startupTimeout" in values else None,
    )
    fewest = number("minWorkers", most=MOST_RANKS)
    return Entry(registration, version, values["defaultVersion"] is True, fewest, max(fewest, number("maxWorkers")))


async def restore(
    entries: list[Entry], options: ServerOptions, inventory: Inventory, runtime: RuntimeDirectory
) -> list[ValidModel]:
    """Reads every model of a snapshot, the default versions first, for the first of a model is its default.

    Raises:
        StartupError: one is not there any more, or cannot be served.
    """
    ordered = sorted(entries, key=lambda entry: not entry.is_default)
    return [await _read(entry, options, inventory, runtime) for entry in ordered]


async def _read(entry: Entry, options: ServerOptions, inventory: Inventory, runtime: RuntimeDirectory) -> ValidModel:
    asked = entry.registration
    try:
        source = _elsewhere(asked) or await obtain(asked, options)
        model = await read_model(source, options, inventory, runtime)
    except (ConfigError, MinServeError) as error:
        raise StartupError(f"the snapshot cannot be restored: model {asked.name}, {asked.url}: {error}") from None
    if model.spec.version != entry.version:
        raise StartupError(
            f"the snapshot cannot be restored: {asked.url} holds version {model.spec.version} of {asked.name}, "
            f"the snapshot has {entry.version}"
        )
    config = model.spec.config.model_copy(update={"min_workers": entry.fewest, "max_workers": entry.most})
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, config=config), workers=entry.fewest)


def _elsewhere(asked: Registration) -> Source | None:
    """What was served from outside the store, and so may be again."""
    path = Path(asked.url)
    found = path.is_absolute() and (path.is_dir() or is_archive(path))
    return Source(Location(path, asked.name, asked.url), asked) if found else None


class Snapshots:
    """Writes snapshots into a folder.

    Args:
        store: the model store, whose files and folders stand there by name, all others by path.
        properties: the configuration that the server was started with; stands in each of them.
        now: seconds since the epoch.
    """

    def __init__(
        self, folder: Path, store: Path, properties: Mapping[str, str], now: Callable[[], float] = time.time
    ) -> None:
        self._folder = folder
        self._store = Path(os.path.abspath(store))
        self._properties = properties
        self._now = now

    def write(self, registry: Registry, kind: str) -> None:
        """Writes one of a kind: startup, snapshot or shutdown. A disk that is full is a line in the log."""
        moment = self._now()
        stamp = time.strftime("%Y%m%d%H%M%S", time.localtime(moment)) + f"{int(moment * 1000) % 1000:03d}"
        file = self._folder / f"{stamp}-{kind}.cfg"
        text = javaproperties.dumps(
            {**self._properties, KEY: json.dumps(self._describe(registry, file.name, moment), indent=2)},
            separator="=",
            comments="Saving snapshot",
        )
        part = file.with_name(f".{file.name}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)  # keystore_pass
            with open(descriptor, "w", encoding="latin-1") as opened:  # everything else is escaped
                opened.write(text)
            os.replace(part, file)
        except OSError as error:
            logger.error("no snapshot is written: %s: %s", file, error.strerror)

    def _describe(self, registry: Registry, name: str, moment: float) -> dict[str, object]:
        models: dict[str, dict[str, object]] = {}
        for served in registry.models():
            spec, config, path = served.spec, served.spec.config, served.source.location.path
            models.setdefault(spec.name, {})[spec.version] = {
                "defaultVersion": served.is_default,
                "marName": path.name if path.parent == self._store else str(path),
                "minWorkers": served.workers,
                "maxWorkers": config.max_workers_or(served.workers),
                "batchSize": config.batch_size,
                "maxBatchDelay": config.max_batch_delay,
                "responseTimeout": int(spec.response_timeout),
                "startupTimeout": int(spec.startup_timeout),
                "runtimeType": spec.runtime,
                **({"parallelLevel": spec.world_size} if config.is_parallel else {}),
            }
        return {"name": name, "modelCount": len(models), "created": int(moment * 1000), "models": models}
