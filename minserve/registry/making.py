"""What a model needs to be served: its files read, a queue, workers, a place for their sockets."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import TYPE_CHECKING

from minserve.dispatch.dispatcher import Dispatcher
from minserve.registry.reading import read_model
from minserve.registry.served import ServedModel
from minserve.telemetry.events import EventLog
from minserve.telemetry.meters import ModelMeters
from minserve.worker.devices import DeviceAllocator
from minserve.worker.memory import new_arena
from minserve.worker.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

    from minserve.config.server import ServerOptions
    from minserve.registry.source import Source
    from minserve.registry.validating import ValidModel
    from minserve.telemetry.events import Event
    from minserve.telemetry.metrics import Metrics
    from minserve.worker.devices import Inventory
    from minserve.worker.runtime import RuntimeDirectory
    from minserve.worker.starter import Starter

logger = logging.getLogger(__name__)


class Maker:
    """Makes the models of one server, which share its devices. For the arguments see `Registry`."""

    def __init__(
        self,
        runtime: RuntimeDirectory,
        inventory: Inventory,
        starter: Starter,
        on_change: Callable[[], None],
        options: ServerOptions,
        on_event: Callable[[str, Event], None] | None,
        metrics: Metrics,
    ) -> None:
        self._runtime = runtime
        self._inventory = inventory
        self._devices = DeviceAllocator(inventory)
        self._starter = starter
        self._on_change = on_change
        self._options = options
        self._on_event = on_event
        self._metrics = metrics

    async def read(self, source: Source) -> ValidModel:
        """Reads a model, and logs what is doubtful in it.

        Raises:
            ConfigError: with every error of its archive, its manifest and its configuration.
            MinServeError: its packages could not be installed.
        """
        model = await read_model(source, self._options, self._inventory, self._runtime)
        for warning in model.warnings:
            logger.warning("%s", warning)
        return model

    def make(self, model: ValidModel, loaded_at_startup: bool) -> ServedModel:
        """Gives a model all that it needs. No worker starts yet."""
        spec = model.spec
        dispatcher = Dispatcher(
            asyncio.get_running_loop(),
            spec.name,
            spec.config.batch_size,
            spec.config.max_batch_delay / 1000,
            spec.queue_limit,
            spec.config.minserve.retry_in_flight,
            ModelMeters(self._metrics, spec.name, spec.version),
            new_arena(spec),
            adaptive=spec.config.minserve.batching == "adaptive",
        )
        directory = self._runtime.new_model_directory()
        hear = functools.partial(self._on_event, spec.title) if self._on_event is not None else None
        events = EventLog(spec.name, on_event=hear)
        supervisor = Supervisor(
            *(spec, model.workers, directory, dispatcher, self._devices, self._starter, events, self._on_change)
        )
        return ServedModel(model, directory, dispatcher, supervisor, events, loaded_at_startup)

    def clear_away(self, served: ServedModel) -> None:
        """Removes what is left of a model whose workers have ended, and its file if it was fetched for it."""
        if served.dispatcher.arena is not None:
            served.dispatcher.arena.close()
        self._runtime.drop_model_directory(served.directory)
        served.source.discard()
