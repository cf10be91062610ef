"""`minserve start`: the server's options from argv, and the server in the foreground."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minserve.cli.detach import detach_server
from minserve.cli.ending import fail
from minserve.errors import ConfigError, MinServeError

if TYPE_CHECKING:
    from minserve.config.server import ServerOptions

DETACHED_LOG_FILE = "minserve.log"


def start(
    more_models: Annotated[list[str] | None, typer.Argument(metavar="[MODELS]...", help="More for --models.")] = None,
    model_store: Annotated[str | None, typer.Option(help="Folder with the model directories.")] = None,
    models: Annotated[
        list[str] | None, typer.Option(help="`all`, or LOCATION or NAME=LOCATION in the store. Default: all.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with server options.", dir_okay=False)] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    inference_port: Annotated[int | None, typer.Option(help="Default: 8080; 0 picks a free one.")] = None,
    management_port: Annotated[int | None, typer.Option(help="Default: 8081; 0 picks a free one.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Default: 8082; 0 picks a free one.")] = None,
    log_level: Annotated[
        str | None, typer.Option(envvar="MINSERVE_LOG_LEVEL", help="debug, info, warning or error. Default: info.")
    ] = None,
    frontends: Annotated[
        int | None,
        typer.Option(envvar="MINSERVE_FRONTENDS", help="Processes that speak HTTP on the inference port. Default: 1."),
    ] = None,
    reload: Annotated[
        bool, typer.Option("--reload", help="Reload a model when a file of its directory changes. For development.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Serve in the background; `minserve stop` ends it.")] = False,
    log_file: Annotated[
        Path | None, typer.Option(help="Log to this file. Default: stderr; with --detach minserve.log.")
    ] = None,
) -> None:
    """Serve every model of a model store, in the foreground."""
    from minserve.config.server import read_server_options

    wanted = [name for item in [*(models or []), *(more_models or [])] for name in item.split(",")]
    given = {
        "model_store": model_store,
        "load_models": wanted or None,
        "host": host,
        "inference_port": inference_port,
        "management_port": management_port,
        "metrics_port": metrics_port,
        "frontends": frontends,
        "reload": reload or None,
        "log_level": log_level.lower() if log_level else None,
    }
    try:
        options = read_server_options(config, {key: value for key, value in given.items() if value is not None})
    except ConfigError as error:
        fail(error)
    if detach:
        detach_server(log_file or Path(DETACHED_LOG_FILE))
    else:
        _serve(options, log_file)


def _serve(options: ServerOptions, log_file: Path | None) -> None:
    import uvloop

    from minserve import console
    from minserve.registry.watch import watch
    from minserve.server import Server
    from minserve.telemetry import logging

    async def serve() -> None:
        server = Server(options, os.environ)
        beside = [asyncio.create_task(console.watch_start(server, log.say))]
        if options.reload:
            beside.append(asyncio.create_task(reload_what_changes(server)))
        try:
            await server.run()
        finally:
            for task in beside:
                task.cancel()

    async def reload_what_changes(server: Server) -> None:
        await server.listening.wait()
        await watch(server.registry)

    try:
        log = logging.configure(options.log_level, log_file, options.log_max_bytes, options.log_files)
    except OSError as error:
        fail(f"--log-file {log_file}: {error.strerror}")
    failure = None
    try:
        uvloop.run(serve())
    except MinServeError as error:
        failure = error
    finally:
        log.close()
    if failure is not None:
        fail(failure)  # after what was logged before it
