"""`minserve start --detach`: the same command in the background."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import typer

from minserve.cli.ending import fail, obey_signals

if TYPE_CHECKING:
    from pathlib import Path

DETACH_TIMEOUT_S = 30.0


def detach_server(log_file: Path) -> None:
    """Starts the same command in the background and waits until it listens, or has said why it does not."""
    from minserve import background

    obey_signals()
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    behind = arguments.index("start") + 1
    arguments[behind:behind] = ["--log-file", str(log_file)]
    try:
        with log_file.open("ab") as log:
            begin = log.tell()
            # The log itself is the server's own affair. What goes past it, a traceback from the depths, ends up there too.
            process = background.start(arguments, log)
    except OSError as error:
        fail(f"--log-file {log_file}: {error.strerror}")
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
    fail(f"the server did not listen within {DETACH_TIMEOUT_S:g} s, see {log_file}")
