"""What a server serves from its start on: every model of the store, or those it is told to."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from minserve.errors import ConfigError, MinServeError, StartupError
from minserve.registry.archive import is_archive
from minserve.registry.download import remove_abandoned
from minserve.registry.fetching import obtain
from minserve.registry.reading import discard, read_model
from minserve.registry.registration import Registration
from minserve.registry.snapshots import parse, restore
from minserve.registry.source import Source
from minserve.registry.store import ADDRESS, Location, locate

if TYPE_CHECKING:
    from minserve.config.server import ServerOptions
    from minserve.registry.validating import ValidModel
    from minserve.worker.devices import Inventory
    from minserve.worker.runtime import RuntimeDirectory

logger = logging.getLogger(__name__)


async def read_models(
    options: ServerOptions, inventory: Inventory, runtime: RuntimeDirectory
) -> tuple[list[ValidModel], dict[str, ConfigError]]:
    """The models to serve, and by name those that cannot be, which stop nothing.

    Raises:
        StartupError: there is no store, a model that is named is not there, two are the same version of one model, or
            there is none at all, unless models can still be registered.
    """
    if options.model_snapshot:
        return await restore(parse(options.model_snapshot), options, inventory, runtime), {}
    models: list[ValidModel] = []
    broken: dict[str, ConfigError] = {}
    await asyncio.to_thread(remove_abandoned, Path(options.model_store))
    for location in await asyncio.to_thread(locate, Path(options.model_store), options.load_models, options.lenient):
        called = location.name or location.file_name
        try:
            model = await _read(location, options, inventory, runtime)
        except ConfigError as error:
            others = broken.keys() | {model.spec.name for model in models}
            if called in others and not options.lenient and not is_archive(location.path):
                raise _second(called, location) from None
            broken[called] = error
            continue
        spec = model.spec
        if any((spec.name, spec.version) == (other.spec.name, other.spec.version) for other in models):
            await discard(model)
            if not options.lenient:
                raise _second(spec.name, location)
            text = f"Model version {spec.version} is already registered for model {spec.name}"
            broken[location.file_name] = ConfigError(f"{location.path}: {text}")
        else:
            models.append(model)
    if not models and not (options.lenient or options.enable_model_api):
        reasons = [str(error).partition("\n")[0] for error in broken.values()] or ["there is none"]
        raise StartupError(f"no model with a valid configuration in {options.model_store}: {'; '.join(reasons)}")
    for name, wrong in broken.items():
        logger.error("%s is not served: %s", name, "; ".join(str(wrong).splitlines()))
    for model in models:
        for warning in model.warnings:
            logger.warning("%s", warning)
    return models, broken


async def _read(
    location: Location, options: ServerOptions, inventory: Inventory, runtime: RuntimeDirectory
) -> ValidModel:
    try:
        source = Source(location)
        if ADDRESS.match(location.url):
            fetched = Path(options.model_store, location.path.name)  # by an earlier start, perhaps
            if not await asyncio.to_thread(fetched.is_file):
                fetched = (await obtain(Registration(location.url, location.name), options)).location.path
            source = Source(Location(fetched, location.name, location.url))
        return await read_model(source, options, inventory, runtime)
    except MinServeError as error:
        if isinstance(error, (ConfigError, StartupError)):
            raise
        raise ConfigError(f"{location.url or location.path}: {error}") from None


def _second(name: str, location: Location) -> StartupError:
    return StartupError(f"two models are called {name}: {location.path} is the second")
