"""How what is served changes: a model is registered, scaled, reloaded, unregistered."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import TYPE_CHECKING

from minserve.errors import CleanupTimeout, ConfigError, Draining, InvalidModel, ModelNotFound
from minserve.registry.fetching import obtain
from minserve.registry.reading import discard
from minserve.registry.source import Source
from minserve.registry.store import locate_named
from minserve.telemetry.events import EventKind
from minserve.worker.devices import groups_that_fit

if TYPE_CHECKING:
    from collections.abc import Callable

    from minserve.config.server import ServerOptions
    from minserve.registry.catalogue import Catalogue
    from minserve.registry.making import Maker
    from minserve.registry.registration import Registration
    from minserve.registry.served import ServedModel
    from minserve.registry.validating import ValidModel
    from minserve.worker.devices import Inventory

logger = logging.getLogger(__name__)


class Changes:
    """Changes what is served; a model version goes through one change at a time. `Registry` has them run to their end.

    Args:
        check_running: raises Draining once the server is stopping.
        tell: called after each change of what is served.

    Attributes:
        leaving: models that are being unregistered and may still have workers.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        maker: Maker,
        options: ServerOptions,
        inventory: Inventory,
        check_running: Callable[[], None],
        tell: Callable[[], None],
    ) -> None:
        self._catalogue = catalogue
        self._maker = maker
        self._options = options
        self._inventory = inventory
        self._check_running = check_running
        self._tell = tell
        self._locks: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)  # by name and version
        self._registering: set[asyncio.Task[object]] = set()  # those that have not begun to start workers
        self.leaving: set[ServedModel] = set()

    def take_in(self, model: ValidModel, loaded_at_startup: bool) -> ServedModel:
        """Makes a model and puts it into the catalogue. No worker starts yet.

        Raises:
            Conflict: the version is there already.
            Draining: the server is stopping.
        """
        self._check_running()
        self._catalogue.check_free(model.spec.name, model.spec.version)
        served = self._maker.make(model, loaded_at_startup)
        self._catalogue.add(served)
        return served

    async def register(self, registration: Registration) -> ServedModel:
        """See `Registry.register`."""
        task = asyncio.current_task()
        assert task is not None
        self._registering.add(task)
        try:
            source = await obtain(registration, self._options)
            try:
                served = await self._read_and_take_in(source)
            except BaseException:
                source.discard()
                raise
        except ConfigError as error:
            raise InvalidModel(str(error)) from None
        except asyncio.CancelledError:
            raise Draining("the server is shutting down") from None
        finally:
            self._registering.discard(task)
        self._catalogue.broken.pop(served.spec.name, None)
        served.supervisor.start()
        logger.info("%s is registered from %s", served.spec.title, registration.url)
        self._tell()
        return served

    def cancel_registrations(self) -> None:
        """Ends those that have not begun to start workers."""
        for task in self._registering:
            task.cancel()

    async def scale(self, name: str, version: str | None, fewest: int, most: int) -> ServedModel:
        """See `Registry.scale`."""
        version = self._catalogue.find(name, version).spec.version
        async with self._locks[name, version]:
            served = self._catalogue.find(name, version)
            fit = groups_that_fit(served.spec.config, served.spec.world_size, self._inventory)
            if fit is not None and most > fit:
                logger.warning("%s: up to %d workers asked for, there are devices for %d", name, most, fit)
                fewest, most = min(fewest, fit), fit
            await served.resize(fewest, most)
        self._tell()
        return served

    async def unregister(self, name: str, version: str | None) -> None:
        """See `Registry.unregister`."""
        version = self._catalogue.find(name, version).spec.version
        async with self._locks[name, version]:
            served = self._catalogue.find(name, version)
            spec = served.spec
            self._catalogue.check_removable(served)
            self._catalogue.remove(served)
            self.leaving.add(served)
            self._tell()
            gone = ModelNotFound(f"Model not found: {name}")
            in_time = await served.end(gone, self._options.unregister_model_timeout, spec.longest_drain)
            self.leaving.discard(served)
            self._maker.clear_away(served)
        if not in_time:
            raise CleanupTimeout(f"Timed out while cleaning resources: {name}")
        logger.info("%s is unregistered", spec.title)

    async def reload(self, name: str, version: str | None) -> None:
        """See `Registry.reload`."""
        catalogue = self._catalogue
        version = catalogue.find(name, version).spec.version if name in catalogue else ""
        async with self._locks[name, version]:
            known = name in catalogue or name not in catalogue.broken
            served = catalogue.find(name, version or None) if known else None
            try:
                model = await self._read_again(name, served)
            except ConfigError as error:
                if served is None:
                    catalogue.broken[name] = error
                else:
                    served.events.record(EventKind.RELOAD_FAILED, "; ".join(str(error).splitlines()))
                raise
            try:
                self._check_running()
                if served is None:
                    served = self.take_in(model, loaded_at_startup=True)
                    del catalogue.broken[name]
                await served.replace(model)
            except BaseException:
                if served is None or served.extracted != model.extracted:
                    await discard(model)
                raise
            logger.info("%s: reloaded", name)

    # ── inside ──

    async def _read_and_take_in(self, source: Source) -> ServedModel:
        model = await self._maker.read(source)
        try:
            async with self._locks[model.spec.name, model.spec.version]:  # one that is being unregistered goes first
                return self.take_in(model, loaded_at_startup=False)
        except BaseException:
            await discard(model)
            raise

    async def _read_again(self, name: str, served: ServedModel | None) -> ValidModel:
        model = await self._maker.read(
            served.source if served is not None else Source(locate_named(name, self._options))
        )
        found = model.spec
        if served is not None and (found.name, found.version) != (served.spec.name, served.spec.version):
            await discard(model)
            raise ConfigError(
                f"{served.source.location.path}: found {found.name}, version {found.version}, allowed: "
                f"{served.spec.name}, version {served.spec.version}, which is what is reloaded; "
                "register another version by itself"
            )
        return model
