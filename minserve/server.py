"""The life of the server process, top to bottom: startup, run, drain, shutdown."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
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
from minserve.worker.guardian import Guardian
from minserve.worker.reaper import Reaper
from minserve.worker.runtime import LiveServer, RuntimeDirectory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from minserve.config.server import ServerOptions
    from minserve.registry.models import ValidModel
    from minserve.worker.devices import Inventory

logger = logging.getLogger(__name__)

BACKLOG = 1024
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal or the ssh session has gone
LAST_WRITES_S = 0.5  # for answers to clients that read them, when nobody wants to wait for those that do not
OPEN_FILES = 65536  # enough for every connection; some libraries walk through all that are allowed


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
        self._hurry = asyncio.Event()
        self._runners: list[web.AppRunner] = []
        self.listening = asyncio.Event()
        self.changed = asyncio.Event()
        self.inference_url = ""
        self.management_url = ""

    async def run(self) -> None:
        """Serves until SIGTERM, SIGINT or SIGHUP, then drains. May be told to stop in any state; another signal hurries.

        Raises:
            StartupError: the server cannot start; no rank has been started then.
        """
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup shall be obeyed
                loop.add_signal_handler(number, self._signalled, number)
        require_c_parser()
        _raise_open_files()
        inventory = read_devices(self._environ)
        models, broken = self._validate(inventory)
        inference = self._bind(self._options.inference_port, "--inference-port")
        management = self._bind(self._options.management_port, "--management-port")
        self._runtime = RuntimeDirectory(self._environ)
        guardian = Guardian(self._runtime.path)
        reaper = Reaper()
        try:
            self.registry = Registry(self._runtime, inventory, self._environ, self._worker_changed, self._options)
            self.registry.broken = broken
            # Those who own devices choose first; plain single processes share what is left.
            for model in sorted(models, key=lambda model: model.spec.config.parallel_type is ParallelType.NONE):
                self.registry.add(model)
            await self._listen(inference, management)
            self._runtime.tell(LiveServer(os.getpid(), self.inference_url, self.management_url))
            logger.info("inference on %s, management on %s", self.inference_url, self.management_url)
            self.listening.set()
            gc.collect()
            gc.freeze()  # modules and routes stay: the collector need not walk through them between requests
            await self._stop.wait()
            await self._shutdown()
        finally:
            reaper.close()
            self._runtime.remove()
            guardian.dismiss()
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # it ends already, and shall end in 0
            for number in SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _signalled(self, number: signal.Signals) -> None:
        """The first signal ends the server, each further one the stage of its end that is under way."""
        if not self._stop.is_set():
            self._stop.set()
        elif number != signal.SIGHUP:  # a terminal that closes sends it twice, itself and through its shell
            self._hurry.set()

    def _worker_changed(self) -> None:
        self._runtime.restore()  # before another rank group needs it
        self.changed.set()

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
        options = self._options
        for app, listener in (
            (inference_app(self.registry, options), inference),
            (management_app(self.registry, options), management),
        ):
            app_runner = runner(app, options)
            await app_runner.setup()
            await web.SockSite(app_runner, listener).start()
            self._runners.append(app_runner)
        self.inference_url, self.management_url = _url(inference), _url(management)

    # ── the end ──

    async def _shutdown(self) -> None:
        """Not ready from now on, but still serving for a while; then what is in flight finishes, and the rest is refused."""
        self.registry.stopping = True
        delay = self._options.shutdown_delay
        if delay:
            logger.info("stopping in %g s: not ready any more, still serving", delay)
            wait = asyncio.create_task(asyncio.sleep(delay))
            if await self._hurried(wait):
                wait.cancel()
        logger.info("stopping: in-flight requests finish first")
        stop = asyncio.create_task(self.registry.stop())
        if await self._hurried(stop):
            logger.warning("in-flight requests are not waited for any longer: there was another signal")
            stop.cancel()
        await asyncio.wait([stop])
        close = asyncio.create_task(self._close())
        if await self._hurried(close):
            await asyncio.wait([close], timeout=LAST_WRITES_S)
            close.cancel()
        if not stop.cancelled():
            stop.result()  # what went wrong in it must not keep the ports open, and shall be told
        logger.info("stopped")

    async def _hurried(self, stage: asyncio.Task[None]) -> bool:
        """Waits for a stage of the end. True if another signal has come before that."""
        signalled = asyncio.create_task(self._hurry.wait())
        await asyncio.wait([stage, signalled], return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        if stage.done():
            return False
        self._hurry.clear()  # it has had its effect; the next stage is for the next signal
        return True

    async def _close(self) -> None:
        """Closes both ports, once the last answers have been read."""
        await asyncio.gather(*(app_runner.cleanup() for app_runner in self._runners))


def _raise_open_files() -> None:
    """As many descriptors as the system lets us have, within reason; each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
