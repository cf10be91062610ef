"""`minserve record`: the batches of a worker, kept in a file."""

from __future__ import annotations

import signal
from pathlib import Path  # typer reads the annotations
from typing import Annotated

import typer

from minserve.cli.ending import fail
from minserve.cli.management import find_management
from minserve.errors import MinServeError


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
            reason = recording.record(find_management(url), model, worker, bodies, kept, typer.echo)
        except KeyboardInterrupt:
            reason = ""
        finally:
            kept.close()
    except MinServeError as error:
        fail(error)
    typer.echo(f"batches recorded: {kept.batches}{f'; the server has ended the recording: {reason}' if reason else ''}")
