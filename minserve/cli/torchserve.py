"""`minserve torchserve`: TorchServe's command line."""

from __future__ import annotations

import os

import typer

from minserve.cli.ending import obey_signals


def torchserve(context: typer.Context) -> None:
    """TorchServe's command line, flag for flag, on TorchServe's configuration files: see `minserve torchserve --help`."""
    from minserve.torchserve.command import main

    raise typer.Exit(main(context.args, os.environ, obey_signals))
