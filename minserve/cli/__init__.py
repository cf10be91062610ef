"""The command line: the only place that reads argv and the environment. A file for each verb; they meet here."""

from __future__ import annotations

from typing import Annotated

import typer

import minserve
from minserve.cli import archive, check, record, replay, schema, start, status, stop, torchserve
from minserve.cli.ending import obey_signals

app = typer.Typer(
    name="minserve",
    help="Puts any PyTorch code that runs under torchrun behind a plain HTTP endpoint.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


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
    if context.invoked_subcommand not in ("start", "torchserve"):
        obey_signals()


# In the order of --help.
app.command()(start.start)
app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(
    torchserve.torchserve
)
app.command()(stop.stop)
app.command()(status.status)
app.command()(check.check)
app.command(context_settings={"help_option_names": ["-h", "--help"]})(archive.archive)
app.command()(schema.schema)
app.command()(record.record)
app.command()(replay.replay)
