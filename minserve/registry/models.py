"""The models that a server serves, by name and version, and those it was told to serve and cannot."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from minserve.config.server import ServerOptions
from minserve.errors import BadRequest, Draining, ModelVersionNotFound
from minserve.registry.catalogue import Catalogue
from minserve.registry.changes import Changes
from minserve.registry.making import Maker
from minserve.registry.numbers import MOST_RANKS
from minserve.registry.registration import Registration
from minserve.registry.served import ServedModel
from minserve.registry.store import Location, locate_named
from minserve.registry.validating import ValidModel
from minserve.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from minserve.errors import ConfigError
    from minserve.telemetry.events import Event
    from minserve.worker.devices import Inventory
    from minserve.worker.runtime import RuntimeDirectory
    from minserve.worker.starter import Starter

__all__ = ["Registration", "Registry", "ServedModel", "ValidModel"]

T = TypeVar("T")


class Registry:
    """Every model of a server.

    Args:
        on_change: called when a worker's state has changed.
        options: what a model that is registered or reloaded is checked against.
        on_event: told each event of each model: the model's title and the event.

    Attributes:
        metrics: of the server; its models' meters belong to them.
        stopping: the server ends; set a while before `stop` where balancers need the time.
        on_models_changed: called after each change of what is served: a registration, another number of workers, another
            default version, a model that goes.
    """

    def __init__(
        self,
        runtime: RuntimeDirectory,
        inventory: Inventory,
        starter: Starter,
        on_change: Callable[[], None],
        options: ServerOptions | None = None,
        on_event: Callable[[str, Event], None] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._options = options or ServerOptions()
        self.metrics = Metrics() if metrics is None else metrics
        self._catalogue = Catalogue(self._options.lenient)
        maker = Maker(runtime, inventory, starter, on_change, self._options, on_event, self.metrics)
        self._changes = Changes(
            *(self._catalogue, maker, self._options, inventory, self._check_running, self._models_changed)
        )
        self._tasks: set[asyncio.Task[object]] = set()
        self.stopping = False
        self.on_models_changed: Callable[[], None] | None = None

    @property
    def broken(self) -> dict[str, ConfigError]:
        """Models that the server was told to serve and whose archive or configuration is wrong."""
        return self._catalogue.broken

    @broken.setter
    def broken(self, broken: dict[str, ConfigError]) -> None:
        self._catalogue.broken = broken

    # ── what a change is: it goes on when whoever asked for it has left ──

    def add(self, model: ValidModel) -> None:
        """Takes a model in at the start of the server and begins to start its workers."""
        self._changes.take_in(model, loaded_at_startup=True).supervisor.start()

    async def register(self, registration: Registration) -> ServedModel:
        """Reads a model, takes it in and begins to start its workers. The first version of a model is its default.

        Raises:
            InvalidModel: its archive or its configuration is wrong; the text lists every error.
            Conflict: the version is registered already.
            ModelNotFound: there is nothing under its url, or that is not allowed.
            Draining: the server is stopping.
            MinServeError: it cannot be fetched, or its packages cannot be installed.
        """
        return await self._change(self._changes.register(registration))

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
        return await self._change(self._changes.scale(name, version, fewest, most))

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
        await self._change(self._changes.unregister(name, version))

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
        await self._change(self._changes.reload(name, version))

    async def stop(self) -> None:
        """Drains and ends every worker of every model. Cancelling it ends them at once, and waits for that, too."""
        self.stopping = True
        self._changes.cancel_registrations()
        models = [*self.models(), *self._changes.leaving]
        try:
            await asyncio.gather(*(model.supervisor.stop(model.spec.config.minserve.drain_timeout) for model in models))
        except asyncio.CancelledError:
            await asyncio.gather(*(model.supervisor.stop(0.0) for model in models))  # whoever had not begun
            raise
        finally:
            if self._tasks:
                await asyncio.wait(self._tasks)

    # ── inside ──

    async def _change(self, work: Coroutine[object, object, T]) -> T:
        try:
            self._check_running()
        except Draining:
            work.close()
            raise
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    def _check_running(self) -> None:
        if self.stopping:
            raise Draining("the server is shutting down")

    def _models_changed(self) -> None:
        if self.on_models_changed is not None:
            self.on_models_changed()

    # ── look-up ──

    def models(self) -> Iterable[ServedModel]:
        """All versions of all models, by name; the versions in the order in which they came."""
        return self._catalogue.all()

    def versions(self, name: str) -> list[ServedModel]:
        """All versions of a model, in the order in which they came; empty where there is none."""
        return self._catalogue.versions(name)

    def only(self) -> ServedModel | None:
        """The default version of the one model that there is; None: there is none, or there are several."""
        names = {model.spec.name for model in self.models()}
        return self.find(names.pop()) if len(names) == 1 else None

    def location(self, name: str, version: str | None = None) -> Location:
        """Where a model, served or broken, lies.

        Raises:
            ConfigError: it is not in the model store any more.
        """
        if name in self._catalogue:
            return self.find(name, version).source.location
        return locate_named(name, self._options)

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """The model that a request names; without a version the default one.

        Raises:
            ModelNotFound, ModelVersionNotFound: there is none.
            ModelUnhealthy: there should be one, and its configuration is wrong.
        """
        return self._catalogue.find(name, version)
