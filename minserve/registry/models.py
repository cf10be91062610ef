"""The models that a server serves, by name and version, and those it was told to serve and cannot."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minserve.config.model import CONFIG_FILE, ParallelType, read_model_config
from minserve.config.problems import raise_errors
from minserve.config.server import ServerOptions
from minserve.dispatch.dispatcher import Dispatcher
from minserve.errors import ConfigError, Draining, ModelNotFound, ModelUnhealthy, ModelVersionNotFound, StartupError
from minserve.registry.store import Location, locate
from minserve.telemetry.events import EventKind, EventLog
from minserve.worker.devices import DeviceAllocator, check_devices, read_inventory
from minserve.worker.spec import ModelSpec
from minserve.worker.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from minserve.config.keys import ModelConfig
    from minserve.config.problems import Problem
    from minserve.worker.devices import Inventory
    from minserve.worker.runtime import RuntimeDirectory

logger = logging.getLogger(__name__)

VERSION = "1.0"  # of every model directory, as TorchServe gives an archive that names none


@dataclass(frozen=True, slots=True)
class ValidModel:
    """A model directory whose configuration has no error."""

    spec: ModelSpec
    workers: int
    warnings: tuple[Problem, ...]


def validate_model(location: Location, options: ServerOptions, inventory: Inventory) -> ValidModel:
    """Reads a model directory and resolves every default.

    Raises:
        ConfigError: with every error of its configuration.
    """
    read = read_model_config(location.path, location.name)
    config = read.config
    world_size = config.world_size(len(inventory))
    raise_errors(check_devices(config, world_size, inventory, read.document))
    yaml = location.path / CONFIG_FILE
    spec = ModelSpec(
        name=read.name,
        version=VERSION,
        model_dir=location.path,
        config=config,
        yaml=yaml.read_bytes() if yaml.exists() else b"",
        world_size=world_size,
        response_timeout=config.response_timeout or options.default_response_timeout,
        startup_timeout=config.startup_timeout or options.default_startup_timeout,
        queue_limit=config.job_queue_size or options.job_queue_size,
        debug=options.log_level == "debug",
    )
    return ValidModel(spec, config.min_workers_or(_default_workers(config, options, inventory)), read.warnings)


def _default_workers(config: ModelConfig, options: ServerOptions, inventory: Inventory) -> int:
    """How many workers a model gets that does not say: one a GPU for a single process, else one."""
    if options.default_workers_per_model is not None:
        return options.default_workers_per_model
    if config.is_parallel or config.parallel_type is ParallelType.CUSTOM or config.device_type == "cpu":
        return 1
    return max(1, len(config.device_ids or inventory.masks))


class ServedModel:
    """One model version: its queue, its workers, and what has happened to them.

    Attributes:
        spec, workers: what is served just now, and the fewest workers; a reload changes both.
    """

    def __init__(
        self, spec: ModelSpec, workers: int, dispatcher: Dispatcher, supervisor: Supervisor, events: EventLog
    ) -> None:
        self.spec = spec
        self.workers = workers
        self.dispatcher = dispatcher
        self.supervisor = supervisor
        self.events = events


class Registry:
    """Every model of a server.

    Args:
        on_change: called when a worker's state has changed.
        options: what a model that is reloaded is checked against.

    Attributes:
        broken: models that the server was told to serve and whose configuration is wrong.
        stopping: the server ends; set a while before `stop` where balancers need the time.
    """

    def __init__(
        self,
        runtime: RuntimeDirectory,
        inventory: Inventory,
        environ: Mapping[str, str],
        on_change: Callable[[], None],
        options: ServerOptions | None = None,
    ) -> None:
        self._runtime = runtime
        self._inventory = inventory
        self._devices = DeviceAllocator(inventory)
        self._environ = environ
        self._on_change = on_change
        self._options = options or ServerOptions()
        self._models: dict[str, dict[str, ServedModel]] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._reloads: set[asyncio.Task[None]] = set()
        self.broken: dict[str, ConfigError] = {}
        self.stopping = False

    # ── life ──

    def add(self, model: ValidModel) -> None:
        """Registers a model and begins to start its workers."""
        self._register(model).supervisor.start()

    async def reload(self, name: str, version: str | None = None) -> None:
        """Reads a model's directory again and puts new workers in the place of the old ones, without a failed request.

        Also brings up a model that was given up, or whose configuration was wrong. Returns when the old workers have ended.
        Cancelling the call does not stop what it has begun. Of two calls for one model the second waits.

        Raises:
            ConfigError: the configuration is wrong, with every error. The old workers go on.
            WorkerFailed: the new workers could not be started. The old ones go on, or are started again.
            Draining: the server is stopping.
            ModelNotFound, ModelVersionNotFound: there is no such model.
        """
        if self.stopping:
            raise Draining("the server is shutting down")
        if name not in self.broken:
            self.find(name, version)
        task = asyncio.create_task(self._reload(name, version))
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)
        await asyncio.shield(task)

    async def stop(self) -> None:
        """Drains and ends every worker of every model. Cancelling it ends them at once, and waits for that, too."""
        self.stopping = True
        models = list(self.models())
        try:
            await asyncio.gather(*(model.supervisor.stop(model.spec.config.minserve.drain_timeout) for model in models))
        except asyncio.CancelledError:
            await asyncio.gather(*(model.supervisor.stop(0.0) for model in models))  # whoever had not begun
            raise
        finally:
            if self._reloads:
                await asyncio.wait(self._reloads)

    # ── inside ──

    def _register(self, model: ValidModel) -> ServedModel:
        spec = model.spec
        dispatcher = Dispatcher(
            asyncio.get_running_loop(),
            spec.name,
            spec.config.batch_size,
            spec.config.max_batch_delay / 1000,
            spec.queue_limit,
            spec.config.minserve.retry_in_flight,
        )
        directory = self._runtime.new_model_directory()
        events = EventLog(spec.name)
        supervisor = Supervisor(
            *(spec, model.workers, directory, dispatcher, self._devices, self._environ, events, self._on_change)
        )
        served = ServedModel(spec, model.workers, dispatcher, supervisor, events)
        self._models.setdefault(spec.name, {})[spec.version] = served
        return served

    async def _reload(self, name: str, version: str | None) -> None:
        async with self._locks[name]:
            served = None if name in self.broken else self.find(name, version)
            try:
                model = await asyncio.to_thread(self._read, name)
            except ConfigError as error:
                if served is None:
                    self.broken[name] = error
                else:
                    served.events.record(EventKind.RELOAD_FAILED, "; ".join(str(error).splitlines()))
                raise
            for warning in model.warnings:
                logger.warning("%s", warning)
            if self.stopping:
                raise Draining("the server is shutting down")
            if served is None:
                served = self._register(model)
                del self.broken[name]
            await served.supervisor.replace(model.spec, model.workers)
            served.spec, served.workers = model.spec, model.workers
            logger.info("%s: reloaded", name)
            await served.supervisor.settled()

    def _read(self, name: str) -> ValidModel:
        return validate_model(self.location(name), self._options, self._inventory)

    # ── look-up ──

    def models(self) -> Iterable[ServedModel]:
        """All versions of all models, by name."""
        return [version for name in sorted(self._models) for version in self._models[name].values()]

    def location(self, name: str) -> Location:
        """Where a model, served or broken, lies.

        Raises:
            ConfigError: it is not in the model store any more.
        """
        for served in self._models.get(name, {}).values():
            return Location(served.spec.model_dir, name)
        try:
            locations = locate(Path(self._options.model_store), self._options.load_models)
        except StartupError as error:
            raise ConfigError(str(error)) from None
        for location in locations:
            if (location.name or location.path.name) == name:
                return location
        raise ConfigError(f"{name} is not in {self._options.model_store} any more")

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """The model that a request names.

        Raises:
            ModelNotFound, ModelVersionNotFound: there is none.
            ModelUnhealthy: there should be one, and its configuration is wrong.
        """
        versions = self._models.get(name)
        if versions is None:
            if name in self.broken:
                raise ModelUnhealthy(f'Model "{name}" cannot be served: its configuration is wrong, see the log')
            raise ModelNotFound(f"Model not found: {name}")
        if version is None:
            return next(iter(versions.values()))
        if version not in versions:
            raise ModelVersionNotFound(f"Model version: {version} does not exist for model: {name}")
        return versions[version]


def read_devices(environ: Mapping[str, str]) -> Inventory:
    """The devices that this server may use."""
    return read_inventory(environ.get("CUDA_VISIBLE_DEVICES"))
