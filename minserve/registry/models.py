"""The models that a server serves, by name and version, and those it was told to serve and cannot."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minserve.config.model import CONFIG_FILE, ParallelType, read_model_config
from minserve.config.problems import raise_errors
from minserve.dispatch.dispatcher import Dispatcher
from minserve.errors import ConfigError, ModelNotFound, ModelUnhealthy, ModelVersionNotFound
from minserve.worker.devices import DeviceAllocator, check_devices, read_inventory
from minserve.worker.spec import ModelSpec
from minserve.worker.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from minserve.config.keys import ModelConfig
    from minserve.config.problems import Problem
    from minserve.config.server import ServerOptions
    from minserve.registry.store import Location
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
    """One model version: its queue and its workers."""

    def __init__(self, spec: ModelSpec, workers: int, dispatcher: Dispatcher, supervisor: Supervisor) -> None:
        self.spec = spec
        self.workers = workers
        self.dispatcher = dispatcher
        self.supervisor = supervisor


class Registry:
    """Every model of a server.

    Args:
        on_change: called when a worker's state has changed.
    """

    def __init__(
        self,
        runtime: RuntimeDirectory,
        inventory: Inventory,
        environ: Mapping[str, str],
        on_change: Callable[[], None],
    ) -> None:
        self._runtime = runtime
        self._devices = DeviceAllocator(inventory)
        self._environ = environ
        self._on_change = on_change
        self._models: dict[str, dict[str, ServedModel]] = {}
        self.broken: dict[str, ConfigError] = {}

    # ── life ──

    def add(self, model: ValidModel) -> None:
        """Registers a model and begins to start its workers."""
        spec = model.spec
        dispatcher = Dispatcher(
            asyncio.get_running_loop(),
            spec.name,
            spec.config.batch_size,
            spec.config.max_batch_delay / 1000,
            spec.queue_limit,
        )
        directory = self._runtime.new_model_directory()
        supervisor = Supervisor(
            *(spec, model.workers, directory, dispatcher, self._devices, self._environ, self._on_change)
        )
        self._models.setdefault(spec.name, {})[spec.version] = ServedModel(spec, model.workers, dispatcher, supervisor)
        supervisor.start()

    async def stop(self) -> None:
        """Drains and ends every worker of every model."""
        await asyncio.gather(
            *(model.supervisor.stop(model.spec.config.minserve.drain_timeout) for model in self.models())
        )

    # ── look-up ──

    def models(self) -> Iterable[ServedModel]:
        """All versions of all models, by name."""
        return [version for name in sorted(self._models) for version in self._models[name].values()]

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
