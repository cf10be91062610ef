"""The command line: the only place that reads argv and the environment."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import minserve
from minserve.errors import ConfigError, MinServeError

if TYPE_CHECKING:
    from minserve.config.server import ServerOptions

DEFAULT_MANAGEMENT_URL = "http://127.0.0.1:8081"
REQUEST_TIMEOUT_S = 5.0
DETACH_TIMEOUT_S = 30.0

app = typer.Typer(
    name="minserve",
    help="Puts any PyTorch code that runs under torchrun behind a plain HTTP endpoint.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _fail(message: object) -> NoReturn:
    typer.echo(f"minserve: {message}", err=True)
    raise typer.Exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minserve {minserve.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand != "start":  # Ctrl-C shall not look like success; see __main__
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


@app.command()
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
    log_level: Annotated[
        str | None, typer.Option(envvar="MINSERVE_LOG_LEVEL", help="debug, info, warning or error. Default: info.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Serve in the background; `minserve stop` ends it.")] = False,
    log_file: Annotated[Path, typer.Option(help="Where a detached server logs.")] = Path("minserve.log"),
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
        "log_level": log_level.lower() if log_level else None,
    }
    try:
        options = read_server_options(config, {key: value for key, value in given.items() if value is not None})
    except ConfigError as error:
        _fail(error)
    if detach:
        _detach(log_file)
    else:
        _serve(options)


def _serve(options: ServerOptions) -> None:
    import uvloop

    from minserve import console
    from minserve.server import Server
    from minserve.telemetry import logging

    async def serve() -> None:
        server = Server(options, os.environ)
        watcher = asyncio.create_task(console.watch_start(server))
        try:
            await server.run()
        finally:
            watcher.cancel()

    logging.configure(options.log_level)
    try:
        uvloop.run(serve())
    except MinServeError as error:
        _fail(error)


def _detach(log_file: Path) -> None:
    """Starts the same command in the background and waits until it listens, or has said why it does not."""
    from minserve.worker.runtime import live_servers

    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    try:
        log_file.open("ab").close()
    except OSError as error:
        _fail(f"--log-file {log_file}: {error.strerror}")
    with log_file.open("ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "minserve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + DETACH_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            with log_file.open("rb") as log:
                log.seek(begin)
                typer.echo(log.read().decode("utf-8", "replace").rstrip(), err=True)
            raise typer.Exit(process.returncode or 1)
        for server in live_servers(os.environ):
            if server.pid == process.pid:
                typer.echo(f"minserve is starting in the background, pid {server.pid}, log {log_file}")
                typer.echo(f"  inference   {server.inference}\n  management  {server.management}")
                return
        time.sleep(0.05)
    process.terminate()
    _fail(f"the server did not listen within {DETACH_TIMEOUT_S:g} s, see {log_file}")


@app.command()
def stop(
    pid: Annotated[int | None, typer.Option(help="Which server, where several run.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the drain and the end.")] = 60.0,
) -> None:
    """Stop a server of this user: what is in flight finishes first."""
    from minserve.worker.runtime import live_servers

    servers = [server for server in live_servers(os.environ) if pid in (None, server.pid)]
    if not servers:
        typer.echo("minserve: no server is running" if pid is None else f"minserve: no server with pid {pid}")
        return
    if len(servers) > 1:
        pids = ", ".join(f"{server.pid} ({server.inference})" for server in servers)
        _fail(f"several servers are running, choose one with --pid: {pids}")
    server = servers[0]
    os.kill(server.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if all(other.pid != server.pid for other in live_servers(os.environ)):
            typer.echo(f"minserve: stopped pid {server.pid}")
            return
        time.sleep(0.05)
    _fail(f"pid {server.pid} still runs after {timeout:g} s")


@app.command()
def status(
    url: Annotated[
        str | None, typer.Option(help="Management address. Default: that of the server that runs here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON of /models/{model}.")] = False,
) -> None:
    """Show the models, workers and ranks of a running server."""
    from minserve import console
    from minserve.worker.runtime import live_servers

    if url is None:
        servers = live_servers(os.environ)
        if len(servers) > 1:
            _fail(f"several servers are running, choose one with --url: {', '.join(s.management for s in servers)}")
        url = servers[0].management if len(servers) == 1 else DEFAULT_MANAGEMENT_URL
    try:
        models = [_get(f"{url}/models/{name}/all") for name in _model_names(url)]
    except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError) as error:
        _fail(f"no answer from {url}: {getattr(error, 'reason', error)}")
    described = [version for versions in models if isinstance(versions, list) for version in versions]
    if as_json:
        typer.echo(json.dumps(described, indent=2))
    else:
        console.print_status(url, described)


def _model_names(url: str) -> list[str]:
    names: list[str] = []
    token = "0"
    while token:
        page = _get(f"{url}/models?next_page_token={token}")
        assert isinstance(page, dict)
        names += [str(model["modelName"]) for model in page["models"]]
        token = page.get("nextPageToken", "")
    return names


def _get(url: str) -> object:
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # a proxy knows nothing of this machine's loopback
    with direct.open(url, timeout=REQUEST_TIMEOUT_S) as answer:
        return json.load(answer)


@app.command()
def check(
    model_dir: Annotated[Path, typer.Argument(help="The model directory.", metavar="MODEL_DIR")],
    config: Annotated[Path | None, typer.Option(help="YAML file with server options.", dir_okay=False)] = None,
) -> None:
    """Validate a model directory and print what a start would run, without starting anything."""
    from minserve.checking import describe_launches
    from minserve.config.server import read_server_options
    from minserve.registry.models import read_devices, validate_model
    from minserve.registry.store import Location

    try:
        options = read_server_options(config, {})
        inventory = read_devices(os.environ)
        model = validate_model(Location(Path(os.path.abspath(model_dir))), options, inventory)
        description = describe_launches(model, inventory, os.environ)
    except MinServeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    for warning in model.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(description)


@app.command()
def schema() -> None:
    """Print the JSON Schema of model-config.yaml, for editors."""
    from minserve.config.model import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
