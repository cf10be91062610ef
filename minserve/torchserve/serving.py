"""A server under TorchServe's command: its logs, its pid file, its snapshots around our server."""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from minserve.errors import MinServeError
from minserve.registry.snapshots import Snapshots
from minserve.server import Server
from minserve.telemetry import torchserve_logs
from minserve.telemetry.torchserve_workers import WorkerLines
from minserve.torchserve.pidfile import claimed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from minserve.torchserve.settings import Settings

logger = logging.getLogger(__name__)

STARTED = "Model server started."


def serve(settings: Settings, environ: Mapping[str, str]) -> int:
    """Serves until it is stopped."""
    options = settings.options

    async def run() -> None:
        server = Server(options, environ, WorkerLines().heard)
        told = asyncio.create_task(tell(server))
        try:
            await server.run()
            if snapshots is not None and server.listening.is_set():
                snapshots.write(server.registry, "shutdown")
        finally:
            told.cancel()

    async def tell(server: Server) -> None:
        await server.listening.wait()
        for api, url in (
            ("Inference", server.inference_url),
            ("Management", server.management_url),
            ("Metrics", server.metrics_url),
        ):
            if url:
                torchserve_logs.SERVER.info("%s API bind to: %s", api, url)
        logs.out.log(STARTED)
        if snapshots is not None:
            snapshots.write(server.registry, "startup")
            server.registry.on_models_changed = functools.partial(snapshots.write, server.registry, "snapshot")

    try:
        logs = torchserve_logs.configure(
            options.log_level, settings.logs, settings.metrics, options.log_max_bytes, options.log_files
        )
    except OSError as error:
        where = error.filename or settings.logs
        print(f"{where}: {error.strerror}; LOG_LOCATION and METRICS_LOCATION choose others", file=sys.stderr)
        return 1
    snapshots = None
    if settings.snapshots is not None:
        snapshots = Snapshots(settings.snapshots, Path(options.model_store), settings.properties)
    failed = False
    try:
        if settings.restored is not None:
            logger.info("models are restored from %s; --no-config-snapshots starts without it", settings.restored)
        for warning in settings.warnings:
            logger.warning("%s", warning)
        with claimed():
            uvloop.run(run())
    except MinServeError as error:
        failed = True
        logger.error("%s", error)
    except OSError as error:
        failed = True
        logger.error("%s: %s", error.filename or "the server ends", error.strerror)
    finally:
        logs.close()
    return int(failed)
