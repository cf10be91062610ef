"""The models that a server serves, by name and version, and those it was told to serve and cannot."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from minserve.config.server import ServerOptions
from minserve.dispatch.dispatcher import Dispatcher
from minserve.errors import (
    BadRequest,
    CleanupTimeout,
    ConfigError,
    Draining,
    InvalidModel,
    ModelNotFound,
    ModelUnhealthy,
    ModelVersionNotFound,
    StartupError,
)
from minserve.registry.catalogue import Catalogue
from minserve.registry.fetching import obtain
from minserve.registry.numbers import MOST_RANKS
from minserve.registry.reading import discard, read_model
from minserve.registry.registration import Registration
from minserve.registry.served import ServedModel
from minserve.registry.source import Source
from minserve.registry.store import Location, locate
from minserve.registry.validating import ValidModel
from minserve.telemetry.events import EventKind, EventLog
from minserve.telemetry.meters import ModelMeters
from minserve.telemetry.metrics import Metrics
from minserve.worker.devices import DeviceAllocator, groups_that_fit, read_inventory
from minserve.worker.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping

    from minserve.telemetry.events import Event
    from minserve.worker.devices import Inventory
    from minserve.worker.runtime import RuntimeDirectory

__all__ = ["Registration", "Registry", "ServedModel", "ValidModel", "read_devices"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Registry:
    """Every model of a server.

    Args:
        on_change: called when a worker's state has changed.
        options: what a model that is registered or reloaded is checked against.
        on_event: told each event of each model: the model's title and the event.

    Attributes:
        metrics: of the server; its models' meters belong to them.
        broken: models that the server was told to serve and whose archive or configuration is wrong.
        stopping: the server ends; set a while before `stop` where balancers need the time.
        on_models_changed: called after each change of what is served: a registration, another number of workers, another
            default version, a model that goes.
    """

    def __init__(
        self,
        runtime: RuntimeDirectory,
        inventory: Inventory,
        environ: Mapping[str, str],
        on_change: Callable[[], None],
        options: ServerOptions | None = None,
        on_event: Callable[[str, Event], None] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._runtime = runtime
        self._inventory = inventory
        self._devices = DeviceAllocator(inventory)
        self._environ = environ
        self._on_change = on_change
        self._on_event = on_event
        self._options = options or ServerOptions()
        self.metrics = Metrics() if metrics is None else metrics
        self._catalogue = Catalogue()
        self._leaving: set[ServedModel] = set()
        self._locks: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)  # by name and version
        self._changes: set[asyncio.Task[object]] = set()
        self._registering: set[asyncio.Task[object]] = set()  # those of them that have not begun to start workers
        self.broken: dict[str, ConfigError] = {}
        self.stopping = False
        self.on_models_changed: Callable[[], None] | None = None

    # ── what a change is: it goes on when whoever asked for it has left ──

    def add(self, model: ValidModel) -> None:
        """Takes a model in at the start of the server and begins to start its workers."""
        self._take_in(model, loaded_at_startup=True).supervisor.start()

    async def register(self, registration: Registration) -> ServedModel:
        """Reads a model, takes it in and begins to start its workers. The first version of a model is its default.

        Raises:
            InvalidModel: its archive or its configuration is wrong; the text lists every error.
            Conflict: the version is registered already.
            ModelNotFound: there is nothing under its url, or that is not allowed.
            Draining: the server is stopping.
            MinServeError: it cannot be fetched, or its packages cannot be installed.
        """
        return await self._change(self._register(registration))

    async def scale(self, name: str, version: str | None, fewest: int, most: int) -> ServedModel:
        """Gives a model version another number of workers: begins to start what is missing, and to drain what is too many.

        With `fewest` 0 it has none, and requests are refused. On GPUs there are no more groups than fit, as with TorchServe.

        Raises:
            BadRequest: `most` is below `fewest`, or one is below 0, or `fewest` is beyond reason.
            ModelNotFound, ModelVersionNotFound: there is no such model.
            Draining: the server is stopping.
        """
        if fewest < 0 or most < fewest:
            text = "max_worker cannot be less than min_worker." if fewest >= 0 else "min_worker cannot be less than 0."
            raise BadRequest(text)
        allowed = MOST_RANKS // self.find(name, version).spec.world_size
        if fewest > allowed:
            raise BadRequest(f"min_worker: found {fewest}, allowed: at most {allowed}")
        return await self._change(self._scale(name, version, fewest, most))

    async def unregister(self, name: str, version: str | None = None) -> None:
        """Takes a model version away, the default one if none is named. Requests that are there are answered first.

        Returns when its workers have ended and its files are gone.

        Raises:
            InvalidModelVersion: it is the default version, and the model has others.
            ModelNotFound, ModelVersionNotFound: there is no such model.
            CleanupTimeout: it took longer than unregister_model_timeout. It is gone all the same.
        """
        if name not in self._catalogue and self.broken.pop(name, None) is not None:
            self._models_changed()
            return
        self._catalogue.check_removable(self.find(name, version))
        await self._change(self._unregister(name, version))

    def set_default(self, name: str, version: str) -> None:
        """Requests that name no version go to this one from now on.

        Raises:
            ModelNotFound, ModelVersionNotFound: there is no such model.
        """
        try:
            self._catalogue.make_default(self.find(name, version))
        except ModelVersionNotFound:
            raise ModelVersionNotFound(f"Model version {version} does not exist for model {name}") from None
        self._models_changed()

    async def reload(self, name: str, version: str | None = None) -> None:
        """Reads a model again and puts new workers in the place of the old ones, without a failed request.

        Also brings up a model that was given up, or whose configuration was wrong. Returns when the old workers have ended.
        Cancelling the call does not stop what it has begun. Of two calls for one model the second waits.

        Raises:
            ConfigError: the configuration is wrong, with every error. The old workers go on.
            WorkerFailed: the new workers could not be started. The old ones go on, or are started again.
            Draining: the server is stopping.
            ModelNotFound, ModelVersionNotFound: there is no such model.
        """
        if name in self._catalogue or name not in self.broken:
            self.find(name, version)
        await self._change(self._reload(name, version))

    async def stop(self) -> None:
        """Drains and ends every worker of every model. Cancelling it ends them at once, and waits for that, too."""
        self.stopping = True
        for task in self._registering:
            task.cancel()
        models = [*self.models(), *self._leaving]
        try:
            await asyncio.gather(*(model.supervisor.stop(model.spec.config.minserve.drain_timeout) for model in models))
        except asyncio.CancelledError:
            await asyncio.gather(*(model.supervisor.stop(0.0) for model in models))  # whoever had not begun
            raise
        finally:
            if self._changes:
                await asyncio.wait(self._changes)

    # ── inside ──

    async def _change(self, work: Coroutine[object, object, T]) -> T:
        if self.stopping:
            work.close()
            raise Draining("the server is shutting down")
        task = asyncio.create_task(work)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    def _models_changed(self) -> None:
        if self.on_models_changed is not None:
            self.on_models_changed()

    def _take_in(self, model: ValidModel, loaded_at_startup: bool) -> ServedModel:
        spec = model.spec
        if self.stopping:
            raise Draining("the server is shutting down")
        self._catalogue.check_free(spec.name, spec.version)
        dispatcher = Dispatcher(
            asyncio.get_running_loop(),
            spec.name,
            spec.config.batch_size,
            spec.config.max_batch_delay / 1000,
            spec.queue_limit,
            spec.config.minserve.retry_in_flight,
            ModelMeters(self.metrics, spec.name, spec.version),
        )
        directory = self._runtime.new_model_directory()
        hear = functools.partial(self._on_event, spec.title) if self._on_event is not None else None
        events = EventLog(spec.name, on_event=hear)
        supervisor = Supervisor(
            *(spec, model.workers, directory, dispatcher, self._devices, self._environ, events, self._on_change)
        )
        served = ServedModel(model, directory, dispatcher, supervisor, events, loaded_at_startup)
        self._catalogue.add(served)
        return served

    async def _register(self, registration: Registration) -> ServedModel:
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
        self.broken.pop(served.spec.name, None)
        served.supervisor.start()
        logger.info("%s is registered from %s", served.spec.title, registration.url)
        self._models_changed()
        return served

    async def _read_and_take_in(self, source: Source) -> ServedModel:
        model = await self._read(source)
        try:
            async with self._locks[model.spec.name, model.spec.version]:  # one that is being unregistered goes first
                return self._take_in(model, loaded_at_startup=False)
        except BaseException:
            await discard(model)
            raise

    async def _scale(self, name: str, version: str | None, fewest: int, most: int) -> ServedModel:
        version = self.find(name, version).spec.version
        async with self._locks[name, version]:
            served = self.find(name, version)
            fit = groups_that_fit(served.spec.config, served.spec.world_size, self._inventory)
            if fit is not None and most > fit:
                logger.warning("%s: up to %d workers asked for, there are devices for %d", name, most, fit)
                fewest, most = min(fewest, fit), fit
            await served.resize(fewest, most)
        self._models_changed()
        return served

    async def _unregister(self, name: str, version: str | None) -> None:
        version = self.find(name, version).spec.version
        async with self._locks[name, version]:
            served = self.find(name, version)
            spec = served.spec
            self._catalogue.check_removable(served)
            self._catalogue.remove(served)
            self._leaving.add(served)
            self._models_changed()
            gone = ModelNotFound(f"Model not found: {name}")
            drain_timeout = max(spec.config.minserve.drain_timeout, spec.response_timeout)
            in_time = await served.end(gone, self._options.unregister_model_timeout, drain_timeout)
            self._leaving.discard(served)
            self._runtime.drop_model_directory(served.directory)
            served.source.discard()
        if not in_time:
            raise CleanupTimeout(f"Timed out while cleaning resources: {name}")
        logger.info("%s is unregistered", spec.title)

    async def _reload(self, name: str, version: str | None) -> None:
        version = self.find(name, version).spec.version if name in self._catalogue else ""
        async with self._locks[name, version]:
            known = name in self._catalogue or name not in self.broken
            served = self.find(name, version or None) if known else None
            try:
                model = await self._read_again(name, served)
            except ConfigError as error:
                if served is None:
                    self.broken[name] = error
                else:
                    served.events.record(EventKind.RELOAD_FAILED, "; ".join(str(error).splitlines()))
                raise
            try:
                if self.stopping:
                    raise Draining("the server is shutting down")
                if served is None:
                    served = self._take_in(model, loaded_at_startup=True)
                    del self.broken[name]
                await served.replace(model)
            except BaseException:
                if served is None or served.extracted != model.extracted:
                    await discard(model)
                raise
            logger.info("%s: reloaded", name)

    async def _read(self, source: Source) -> ValidModel:
        model = await read_model(source, self._options, self._inventory, self._runtime)
        for warning in model.warnings:
            logger.warning("%s", warning)
        return model

    async def _read_again(self, name: str, served: ServedModel | None) -> ValidModel:
        model = await self._read(served.source if served is not None else Source(self.location(name)))
        found = model.spec
        if served is not None and (found.name, found.version) != (served.spec.name, served.spec.version):
            await discard(model)
            raise ConfigError(
                f"{served.source.location.path}: found {found.name}, version {found.version}, allowed: "
                f"{served.spec.name}, version {served.spec.version}, which is what is reloaded; "
                "register another version by itself"
            )
        return model

    # ── look-up ──

    def models(self) -> Iterable[ServedModel]:
        """All versions of all models, by name; the versions in the order in which they came."""
        return self._catalogue.all()

    def versions(self, name: str) -> list[ServedModel]:
        """All versions of a model, in the order in which they came; empty where there is none."""
        return self._catalogue.versions(name)

    def location(self, name: str, version: str | None = None) -> Location:
        """Where a model, served or broken, lies.

        Raises:
            ConfigError: it is not in the model store any more.
        """
        if name in self._catalogue:
            return self.find(name, version).source.location
        options = self._options
        try:
            locations = locate(Path(options.model_store), options.load_models, options.lenient)
        except StartupError as error:
            raise ConfigError(str(error)) from None
        for location in locations:
            if (location.name or location.file_name) == name:
                return location
        raise ConfigError(f"{name} is not in {options.model_store} any more")

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """The model that a request names; without a version the default one.

        Raises:
            ModelNotFound, ModelVersionNotFound: there is none.
            ModelUnhealthy: there should be one, and its configuration is wrong.
        """
        try:
            return self._catalogue.find(name, version)
        except ModelNotFound:
            if name not in self.broken or self._options.lenient:
                raise  # TorchServe knows nothing of what it cannot load
            raise ModelUnhealthy(f'Model "{name}" cannot be served: its configuration is wrong, see the log') from None


def read_devices(environ: Mapping[str, str]) -> Inventory:
    """The devices that this server may use."""
    return read_inventory(environ.get("CUDA_VISIBLE_DEVICES"))
