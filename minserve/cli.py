"""The command line: the only place that reads argv and the environment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import minserve
from minserve.errors import ConfigError, MinServeError

if TYPE_CHECKING:
    from minserve.client import Client
    from minserve.config.server import ServerOptions
    from minserve.playlist import Playlist
    from minserve.replay import Replay

DEFAULT_MANAGEMENT_URL = "http://127.0.0.1:8081"
REQUEST_TIMEOUT_S = 5.0
DETACH_TIMEOUT_S = 30.0
STATUS_EVENTS = 5  # the latest of each model
DETACHED_LOG_FILE = "minserve.log"

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


def _obey_signals() -> None:
    """As any command does: Ctrl-C shall not look like success. See __main__."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand not in ("start", "torchserve"):
        _obey_signals()


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
    metrics_port: Annotated[int | None, typer.Option(help="Default: 8082; 0 picks a free one.")] = None,
    log_level: Annotated[
        str | None, typer.Option(envvar="MINSERVE_LOG_LEVEL", help="debug, info, warning or error. Default: info.")
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
        "reload": reload or None,
        "log_level": log_level.lower() if log_level else None,
    }
    try:
        options = read_server_options(config, {key: value for key, value in given.items() if value is not None})
    except ConfigError as error:
        _fail(error)
    if detach:
        _detach(log_file or Path(DETACHED_LOG_FILE))
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
        _fail(f"--log-file {log_file}: {error.strerror}")
    failure = None
    try:
        uvloop.run(serve())
    except MinServeError as error:
        failure = error
    finally:
        log.close()
    if failure is not None:
        _fail(failure)  # after what was logged before it


def _detach(log_file: Path) -> None:
    """Starts the same command in the background and waits until it listens, or has said why it does not."""
    from minserve import background

    _obey_signals()
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    behind = arguments.index("start") + 1
    arguments[behind:behind] = ["--log-file", str(log_file)]
    try:
        with log_file.open("ab") as log:
            begin = log.tell()
            # The log itself is the server's own affair. What goes past it, a traceback from the depths, ends up there too.
            process = background.start(arguments, log)
    except OSError as error:
        _fail(f"--log-file {log_file}: {error.strerror}")
    try:
        server = background.wait(process, os.environ, DETACH_TIMEOUT_S)
    except KeyboardInterrupt:
        process.terminate()
        raise
    if server is not None:
        typer.echo(f"minserve is starting in the background, pid {server.pid}, log {log_file}")
        typer.echo(f"  inference   {server.inference}\n  management  {server.management}")
        if server.metrics:
            typer.echo(f"  metrics     {server.metrics}/metrics")
        return
    if process.poll() is not None:
        with log_file.open("rb") as log:
            log.seek(begin if begin <= log_file.stat().st_size else 0)  # it may be a new file by now
            typer.echo(log.read().decode("utf-8", "replace").rstrip(), err=True)
        raise typer.Exit(process.returncode or 1)
    process.terminate()
    _fail(f"the server did not listen within {DETACH_TIMEOUT_S:g} s, see {log_file}")


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def torchserve(context: typer.Context) -> None:
    """TorchServe's command line, flag for flag, on TorchServe's configuration files: see `minserve torchserve --help`."""
    from minserve.torchserve.command import main

    raise typer.Exit(main(context.args, os.environ, _obey_signals))


@app.command()
def stop(
    pid: Annotated[int | None, typer.Option(help="Which server, where several run.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the drain and the end.")] = 60.0,
    now: Annotated[bool, typer.Option("--now", help="Do not let finish what is in flight.")] = False,
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
        time.sleep(0.05)
        if all(other.pid != server.pid for other in live_servers(os.environ)):
            typer.echo(f"minserve: stopped pid {server.pid}")
            return
        if now:
            with contextlib.suppress(ProcessLookupError):  # it may have ended just now
                os.kill(server.pid, signal.SIGINT)  # each signal after the first cuts a stage of the end short
    _fail(f"pid {server.pid} still runs after {timeout:g} s")


@app.command()
def status(
    url: Annotated[
        str | None,
        typer.Option(help="Management address, http, https or unix:/path. Default: that of the server that runs here."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON of /models/{model}, with the latest events.")
    ] = False,
) -> None:
    """Show the models, workers and ranks of a running server."""
    from minserve import console

    client = _management(url)
    try:
        described = [version for name in _model_names(client) for version in _describe(client, name)]
    except MinServeError as error:
        _fail(error)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        _fail(f"{client.url}: found an answer that is not minserve's: {error!r}")
    if as_json:
        typer.echo(json.dumps(described, indent=2))
    else:
        console.print_status(client.url, described)


def _management(url: str | None) -> Client:
    """The management address that was named, or that of the server that runs here. A server of ours is known by its note."""
    from minserve.client import Client
    from minserve.worker.runtime import live_servers

    servers = [one for one in live_servers(os.environ) if url in (None, one.management)]
    if len(servers) > 1:
        _fail(f"several servers are running, choose one with --url: {', '.join(s.management for s in servers)}")
    if not servers:
        return Client(url or DEFAULT_MANAGEMENT_URL)
    return Client(servers[0].management, servers[0].certificate, servers[0].management_key())


def _describe(client: Client, name: str) -> list[dict[str, object]]:
    """What management says of each version of a model, with its latest events."""
    versions = _get(client, f"/models/{name}/all")
    assert isinstance(versions, list)
    for version in versions:
        answer = _get(client, f"/models/{name}/{version.get('modelVersion', 'all')}/events?limit={STATUS_EVENTS}")
        assert isinstance(answer, dict)
        version["events"] = answer["events"]
    return versions


def _model_names(client: Client) -> list[str]:
    names: list[str] = []
    token = "0"
    while token:
        page = _get(client, f"/models?next_page_token={token}")
        assert isinstance(page, dict)
        names += [str(model["modelName"]) for model in page["models"]]
        token = page.get("nextPageToken", "")
    return list(dict.fromkeys(names))


def _get(client: Client, path: str) -> object:
    return client.get(path, REQUEST_TIMEOUT_S)


@app.command()
def check(
    model_dir: Annotated[Path, typer.Argument(help="The model directory, or an archive.", metavar="MODEL_DIR")],
    config: Annotated[Path | None, typer.Option(help="YAML file with server options.", dir_okay=False)] = None,
) -> None:
    """Validate a model directory or an archive and print what a start would run, without starting anything."""
    from minserve.checking import describe_launches
    from minserve.config.server import read_server_options
    from minserve.registry.models import read_devices, validate_model
    from minserve.registry.store import Location

    try:
        options = read_server_options(config, {})
        inventory = read_devices(os.environ).first(options.number_of_gpu)
        location = Location(Path(os.path.abspath(model_dir)))
        with tempfile.TemporaryDirectory(prefix="minserve-check-") as folder:
            model = validate_model(location, options, inventory, into=Path(folder) / "model", strict=True)
        description = describe_launches(model, inventory, os.environ)
    except MinServeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    for warning in model.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(description)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def archive(
    model_dir: Annotated[
        Path | None,
        typer.Argument(help="A model directory; all of it goes in, no option is needed.", metavar="MODEL_DIR"),
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="Name of the model and of the archive.")] = None,
    handler: Annotated[str | None, typer.Option(help="FILE[:NAME], or the name of a shipped handler.")] = None,
    version: Annotated[str | None, typer.Option("-v", "--version", help="The model's version.")] = None,
    serialized_file: Annotated[str | None, typer.Option(help="Weights or a TorchScript file: .pt, .pth.")] = None,
    model_file: Annotated[str | None, typer.Option(help="Python file with the model's class.")] = None,
    extra_files: Annotated[
        str | None, typer.Option(help="Files, patterns, and folders of which the content goes in, between commas.")
    ] = None,
    runtime: Annotated[str | None, typer.Option(help="python or python3. Default: python.")] = None,
    export_path: Annotated[Path, typer.Option(help="Folder for the archive. Default: the current one.")] = Path(),
    archive_format: Annotated[
        str,
        typer.Option(help="default: .mar; zip-store: .mar, not compressed; tgz: .tar.gz; no-archive: a folder."),
    ] = "default",
    force: Annotated[bool, typer.Option("-f", "--force", help="Overwrite an archive that is there.")] = False,
    requirements_file: Annotated[
        str | None, typer.Option("-r", "--requirements-file", help="List of packages for pip.")
    ] = None,
    config_file: Annotated[str | None, typer.Option("-c", "--config-file", help="The model's YAML.")] = None,
) -> None:
    """Make an archive (.mar) of a model directory, or of single files with torch-model-archiver's options."""
    from minserve.archiver import Order, make_archive

    order = Order(
        *(model_dir, model_name, handler, version, serialized_file, model_file, extra_files, runtime),
        *(export_path, archive_format, force, requirements_file, config_file),
    )
    try:
        path = make_archive(order, lambda text: typer.echo(f"warning: {text}", err=True))
    except ConfigError as error:
        _fail(error)
    typer.echo(path)


@app.command()
def schema() -> None:
    """Print the JSON Schema of model-config.yaml, for editors."""
    from minserve.config.model import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def record(
    model: Annotated[str, typer.Argument(help="Name of a model that is served.", metavar="MODEL")],
    file: Annotated[Path, typer.Argument(help="Where the recording goes; a new file.", metavar="FILE", dir_okay=False)],
    worker: Annotated[int, typer.Option(help="Number of the worker.")] = 0,
    bodies: Annotated[bool, typer.Option("--bodies/--no-bodies", help="Keep the requests' bodies, too.")] = False,
    max_bytes: Annotated[
        int, typer.Option(help="Bytes on disk; the newest batches are kept, at half of it FILE becomes FILE.1.")
    ] = 256 * 1024 * 1024,
    url: Annotated[
        str | None, typer.Option(help="Management address. Default: that of the server that runs here.")
    ] = None,
) -> None:
    """Record the batches of a worker until Ctrl-C, for `minserve replay`. The file holds what clients sent."""
    from minserve import recording

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        kept = recording.RecordingFile(file, max_bytes)
        try:
            reason = recording.record(_management(url), model, worker, bodies, kept, typer.echo)
        except KeyboardInterrupt:
            reason = ""
        finally:
            kept.close()
    except MinServeError as error:
        _fail(error)
    typer.echo(f"batches recorded: {kept.batches}{f'; the server has ended the recording: {reason}' if reason else ''}")


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="A recording; FILE.1 is read before it.", metavar="FILE")],
    model_dir: Annotated[Path, typer.Argument(help="The model directory to play it into.", metavar="MODEL_DIR")],
    nproc: Annotated[int | None, typer.Option(help="Ranks. Default: as the model directory says.")] = None,
    seq: Annotated[str | None, typer.Option(help="Batches to play: A:B, both among them. Default: all.")] = None,
    incarnation: Annotated[
        str | None,
        typer.Option(help="Which life of the worker, where the recording has several; its beginning is enough."),
    ] = None,
) -> None:
    """Play recorded batches into a rank group of a model directory. Exit 1 if one fails."""
    from minserve.playlist import choose, parse_range
    from minserve.recording import read_recording

    try:
        records, warnings = read_recording(file)
        playlist = choose(records, parse_range(seq), incarnation)
    except MinServeError as error:
        _fail(error)
    for warning in [*warnings, *playlist.notes]:
        typer.echo(f"minserve: {warning}", err=True)
    _replay(playlist, model_dir, nproc)


def _replay(playlist: Playlist, model_dir: Path, nproc: int | None) -> None:
    import uvloop

    from minserve.config.server import ServerOptions
    from minserve.registry.models import read_devices, validate_model
    from minserve.registry.store import Location
    from minserve.replay import Replay, with_ranks
    from minserve.telemetry import logging

    async def play() -> Replay:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)  # type: ignore[union-attr]
        played = Replay(spec, inventory, os.environ, typer.echo)
        await played.run(playlist.batches)
        return played

    log = None
    try:
        inventory = read_devices(os.environ)
        model = validate_model(Location(Path(os.path.abspath(model_dir))), ServerOptions(), inventory)
        spec = with_ranks(model.spec, nproc)
        if spec.world_size != playlist.header.world_size:
            what = f"recorded with {playlist.header.world_size} ranks, played with {spec.world_size}"
            typer.echo(f"minserve: {what}", err=True)
        log = logging.configure("info")
        played = uvloop.run(play())
    except MinServeError as error:
        failure = str(error) + "".join(f"\n    {line}" for line in getattr(error, "last_lines", ()))
    except asyncio.CancelledError:
        failure = "stopped before the end"
    else:
        failure = _verdict(played, len(playlist.batches))
    finally:
        if log is not None:
            log.close()
    if failure:
        _fail(failure)
    typer.echo(f"batches played: {len(playlist.batches)}, all went well")


def _verdict(played: Replay, batches: int) -> str:
    """What went wrong, empty if nothing did."""
    parts = []
    if played.failed:
        parts.append(f"failed: batch {', '.join(map(str, played.failed))}")
    if played.death is not None:
        parts.append(f"the ranks did not survive it: {played.death}")
    if played.sent < batches:
        parts.append(f"{batches - played.sent} of {batches} batches were not sent")
    return "; ".join(parts)
