"""The life of the server process, top to bottom: startup, run, drain, shutdown."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from minserve.config.keys import ParallelType
from minserve.errors import ConfigError, StartupError
from minserve.frontend.app import inference_app, management_app, require_c_parser, runner
from minserve.registry.models import Registry, read_devices, validate_model
from minserve.registry.store import locate
from minserve.worker.runtime import LiveServer, RuntimeDirectory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from minserve.config.server import ServerOptions
    from minserve.registry.models import ValidModel
    from minserve.worker.devices import Inventory

logger = logging.getLogger(__name__)

BACKLOG = 1024
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal or the ssh session has gone


class Server:
    """One server. `run` is its whole life.

    Attributes:
        listening: set once both ports accept; `inference_url` and `management_url` are good from then on.
        changed: set whenever a worker's state has changed; whoever watches clears it.
    """

    def __init__(self, options: ServerOptions, environ: Mapping[str, str]) -> None:
        self._options = options
        self._environ = environ
        self._stop = asyncio.Event()
        self._runners: list[web.AppRunner] = []
        self.listening = asyncio.Event()
        self.changed = asyncio.Event()
        self.inference_url = ""
        self.management_url = ""

    async def run(self) -> None:
        """Serves until SIGTERM, SIGINT or SIGHUP, then drains. May be told to stop in any state.

        Raises:
            StartupError: the server cannot start; no rank has been started then.
        """
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._stop.set)
        require_c_parser()
        inventory = read_devices(self._environ)
        models, broken = self._validate(inventory)
        inference = self._bind(self._options.inference_port, "--inference-port")
        management = self._bind(self._options.management_port, "--management-port")
        runtime = RuntimeDirectory(self._environ)
        try:
            self.registry = Registry(runtime, inventory, self._environ, self.changed.set)
            self.registry.broken = broken
            # Those who own devices choose first; plain single processes share what is left.
            for model in sorted(models, key=lambda model: model.spec.config.parallel_type is ParallelType.NONE):
                self.registry.add(model)
            await self._listen(inference, management)
            runtime.tell(LiveServer(os.getpid(), self.inference_url, self.management_url))
            logger.info("inference on %s, management on %s", self.inference_url, self.management_url)
            self.listening.set()
            gc.collect()
            gc.freeze()  # modules and routes stay: the collector need not walk through them between requests
            await self._stop.wait()
            await self._shutdown()
        finally:
            runtime.remove()
            for number in SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # it ends already, and shall end in 0

    # ── startup ──

    def _validate(self, inventory: Inventory) -> tuple[list[ValidModel], dict[str, ConfigError]]:
        locations = locate(Path(self._options.model_store), self._options.load_models)
        models: list[ValidModel] = []
        broken: dict[str, ConfigError] = {}
        for location in locations:
            name = location.name or location.path.name
            if name in broken or any(model.spec.name == name for model in models):
                raise StartupError(f"two models are called {name}: {location.path} is the second")
            try:
                model = validate_model(location, self._options, inventory)
            except ConfigError as error:
                broken[name] = error
            else:
                models.append(model)
        if not models:
            reasons = [str(error).partition("\n")[0] for error in broken.values()] or ["there is none"]
            raise StartupError(
                f"no model with a valid configuration in {self._options.model_store}: {'; '.join(reasons)}"
            )
        for name, wrong in broken.items():
            logger.error("%s is not served: %s", name, "; ".join(str(wrong).splitlines()))
        for model in models:
            for warning in model.warnings:
                logger.warning("%s", warning)
        return models, broken

    def _bind(self, port: int, option: str) -> socket.socket:
        """Binds before any rank starts: a port that is taken is known at once."""
        host = self._options.host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            choose = "--host" if isinstance(error, socket.gaierror) else option
            raise StartupError(f"cannot listen on {host}:{port}: {error.strerror}; {choose} chooses another") from None
        listener.setblocking(False)
        return listener

    async def _listen(self, inference: socket.socket, management: socket.socket) -> None:
        limit = self._options.max_request_size
        for app, listener in (
            (inference_app(self.registry, limit), inference),
            (management_app(self.registry, limit), management),
        ):
            app_runner = runner(app)
            await app_runner.setup()
            await web.SockSite(app_runner, listener).start()
            self._runners.append(app_runner)
        self.inference_url, self.management_url = _url(inference), _url(management)

    # ── the end ──

    async def _shutdown(self) -> None:
        """Lets what is in flight finish, answers the rest, ends the ranks, then the listeners."""
        logger.info("stopping: in-flight requests finish first")
        await self.registry.stop()
        await asyncio.gather(*(app_runner.cleanup() for app_runner in self._runners))
        logger.info("stopped")


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
