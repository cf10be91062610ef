"""The life of the server process, top to bottom: startup, run, drain, shutdown."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import resource
import signal
import sys
from typing import TYPE_CHECKING

from aiohttp import web

from minserve.config.addresses import Role
from minserve.config.keys import ParallelType
from minserve.config.metrics import server_metrics
from minserve.errors import ConfigError, StartupError
from minserve.frontend.app import (
    combined_app,
    inference_app,
    make_keys,
    management_app,
    metrics_app,
    require_c_parser,
    runner,
)
from minserve.frontend.listeners import bind_all, places
from minserve.frontend.tls import read_identity, tls_context
from minserve.frontends.pool import Frontends
from minserve.registry.models import Registry
from minserve.registry.startup import read_models
from minserve.telemetry.system import SystemMetrics
from minserve.worker.devices import read_inventory
from minserve.worker.guardian import Guardian
from minserve.worker.reaper import Reaper
from minserve.worker.runtime import LiveServer, RuntimeDirectory
from minserve.worker.starter import Starter

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping, Set

    from minserve.config.server import ServerOptions
    from minserve.frontend.auth import Keys
    from minserve.frontend.listeners import Listener
    from minserve.frontend.tls import Identity
    from minserve.registry.models import ValidModel
    from minserve.telemetry.events import Event
    from minserve.telemetry.metrics import Metrics
    from minserve.worker.devices import Inventory

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal or the ssh session has gone
LAST_WRITES_S = 0.5  # for answers to clients that read them, when nobody wants to wait for those that do not
# Before the collector looks for garbage. A hundred requests in flight are over a thousand objects and none of them garbage:
# with the usual 700 it would look with every other batch, and find nothing.
NEW_OBJECTS = 10_000
OPEN_FILES = 65536  # enough for every connection; some libraries walk through all that are allowed


class Server:
    """One server. `run` is its whole life.

    Args:
        on_event: told each event of each model as it happens.

    Attributes:
        listening: set once all addresses accept; the URLs are good from then on.
        metrics_url: "" where there is no such address.
        changed: set whenever a worker's state has changed; whoever watches clears it.
    """

    def __init__(
        self,
        options: ServerOptions,
        environ: Mapping[str, str],
        on_event: Callable[[str, Event], None] | None = None,
    ) -> None:
        self._options = options
        self._environ = environ
        self._on_event = on_event
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._runners: list[web.AppRunner] = []
        self.listening = asyncio.Event()
        self.changed = asyncio.Event()
        self._listeners: list[Listener] = []
        self._keys: Keys | None = None
        self._frontends: Frontends | None = None
        self.inference_url = ""
        self.management_url = ""
        self.metrics_url = ""

    async def run(self) -> None:
        """Serves until SIGTERM, SIGINT or SIGHUP, then drains. May be told to stop in any state; another signal hurries.

        Raises:
            StartupError: the server cannot start; no rank has been started then.
        """
        self._take_signals()
        require_c_parser()
        _raise_open_files()
        metrics = self._metrics()
        inventory = read_inventory(self._environ).first(self._options.number_of_gpu)
        self._runtime = RuntimeDirectory(self._environ)
        guardian = Guardian(self._runtime.path, self._runtime.models)
        reaper = Reaper()
        starter = Starter(environment_of_models(self._options, self._environ), self._runtime.path)
        options = self._options
        system = SystemMetrics(
            *(metrics, options.metric_time_interval, options.system_metrics_cmd),
            *(options.number_of_gpu != 0, self._environ),
        )
        try:
            found = await self._read_models(inventory)
            if found is None:
                return
            await self._open(found, inventory, starter, metrics)
            self.listening.set()
            if not options.disable_system_metrics:
                system.start()
            gc.collect()
            gc.freeze()  # modules and routes stay: the collector need not walk through them between requests
            gc.set_threshold(NEW_OBJECTS)
            await self._stop.wait()
            await self._shutdown()
        finally:
            await system.stop()
            await starter.close()
            if self._frontends is not None:
                self._frontends.kill()
            for listener in self._listeners:
                listener.close()
            if self._keys is not None:
                self._keys.remove()
            reaper.close()
            self._runtime.remove()
            guardian.dismiss()
            _ignore_signals()

    def _take_signals(self) -> None:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup shall be obeyed
                asyncio.get_running_loop().add_signal_handler(number, self._signalled, number)

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

    def _metrics(self) -> Metrics:
        try:
            return server_metrics(self._options)
        except ConfigError as error:
            raise StartupError(str(error)) from None

    async def _read_models(self, inventory: Inventory) -> tuple[list[ValidModel], dict[str, ConfigError]] | None:
        """What to serve, and what cannot be; None if somebody has stopped the server meanwhile."""
        reading = asyncio.create_task(read_models(self._options, inventory, self._runtime))
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait([reading, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not reading.done():
            reading.cancel()
            await asyncio.wait([reading])
            return None
        return reading.result()

    async def _open(
        self,
        found: tuple[list[ValidModel], dict[str, ConfigError]],
        inventory: Inventory,
        starter: Starter,
        metrics: Metrics,
    ) -> None:
        """Takes the addresses, starts the models' workers, and listens."""
        options = self._options
        self._listeners = bind_all(places(options))
        tls = any(listener.address.tls for listener in self._listeners)
        # Before any rank starts: its files may be wrong.
        identity = read_identity(options) if tls else None
        context = tls_context(identity) if identity is not None else None
        self._keys = make_keys(options)
        self.registry = Registry(
            *(self._runtime, inventory, starter, self._worker_changed),
            *(options, self._on_event, metrics),
        )
        models, self.registry.broken = found
        # Those who own devices choose first; plain single processes share what is left.
        for model in sorted(models, key=lambda model: model.spec.config.parallel_type is ParallelType.NONE):
            self.registry.add(model)
        await self._listen(context, identity)

    async def _listen(self, context: ssl.SSLContext | None, identity: Identity | None) -> None:
        """Accepts on every address, and tells other commands of this user where."""
        urls: dict[Role, str] = {}
        for listener in self._listeners:
            if Role.INFERENCE in listener.roles and self._options.frontends > 1:
                await self._listen_behind_frontends(listener, identity if listener.address.tls else None)
            else:
                app_runner = await self._run(self._application(listener.roles), self._options)
                await listener.serve(app_runner, context, self._options.header_timeout)
            urls = dict.fromkeys(listener.roles, listener.address.url) | urls
        self.inference_url, self.management_url = urls[Role.INFERENCE], urls[Role.MANAGEMENT]
        self.metrics_url = urls.get(Role.METRICS, "")
        where = (self.inference_url, self.management_url, self.metrics_url)
        key_file = str(self._keys.path) if self._keys is not None else ""
        certificate = identity.certificate.decode() if identity is not None else ""
        self._runtime.tell(LiveServer(os.getpid(), *where, certificate, key_file))
        logger.info("inference on %s, management on %s, metrics on %s", *where[:2], where[2] or "no address")

    async def _run(self, app: web.Application, options: ServerOptions) -> web.AppRunner:
        app_runner = runner(app, options)
        await app_runner.setup()
        self._runners.append(app_runner)
        return app_runner

    async def _listen_behind_frontends(self, listener: Listener, identity: Identity | None) -> None:
        """Other processes accept there, and come to this one with what is no prediction."""
        # Those who accept keep the access log and the limit.
        options = self._options.model_copy(update={"access_log": False, "max_connections": sys.maxsize})
        app_runner = await self._run(self._application(listener.roles), options)
        assert app_runner.server is not None
        self._frontends = Frontends(
            *(self._options, self.registry, self._keys, listener.socket, app_runner.server, identity),
            *(self._runtime.path, self._environ),
        )
        try:
            await self._frontends.start()
        except StartupError:
            await self.registry.stop()
            raise

    def _application(self, roles: Set[Role]) -> web.Application:
        if {Role.INFERENCE, Role.MANAGEMENT} <= roles:
            return combined_app(self.registry, self._options, self._keys)
        if Role.INFERENCE in roles:
            return inference_app(self.registry, self._options, self._keys)
        if Role.MANAGEMENT in roles:
            return management_app(self.registry, self._options, self._keys)
        return metrics_app(self.registry, self._options)

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
        """Closes all ports, once the last answers have been read."""
        if self._frontends is not None:
            await self._frontends.close()
        await asyncio.gather(*(app_runner.cleanup() for app_runner in self._runners))


def _ignore_signals() -> None:
    """The server ends already, and shall end in 0."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _raise_open_files() -> None:
    """As many descriptors as the system lets us have, within reason; each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def environment_of_models(options: ServerOptions, environ: Mapping[str, str]) -> Mapping[str, str]:
    """What of the server's environment the models' processes get."""
    kept = {name: value for name, value in environ.items() if not re.fullmatch(options.blacklist_env_vars, name)}
    if options.number_of_gpu == 0:
        kept["CUDA_VISIBLE_DEVICES"] = ""  # as on a machine without one
    return kept
