"""`minserve check`: a model directory or an archive validated, and nothing started."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from minserve.errors import ConfigError, MinServeError


def check(
    model_dir: Annotated[Path, typer.Argument(help="The model directory, or an archive.", metavar="MODEL_DIR")],
    config: Annotated[Path | None, typer.Option(help="YAML file with server options.", dir_okay=False)] = None,
) -> None:
    """Validate a model directory or an archive and print what a start would run, without starting anything."""
    from minserve.checking import describe_launches
    from minserve.config.server import read_server_options
    from minserve.registry.store import Location
    from minserve.registry.validating import validate_model
    from minserve.worker.devices import read_inventory

    try:
        options = read_server_options(config, {})
        inventory = read_inventory(os.environ).first(options.number_of_gpu)
        location = Location(Path(os.path.abspath(model_dir)))
        with tempfile.TemporaryDirectory(prefix="minserve-check-") as folder:
            model = validate_model(location, options, inventory, into=Path(folder) / "model", strict=True)
            _compile(model.spec.model_dir / model.spec.handler.partition(":")[0])
        description = describe_launches(model, inventory, os.environ)
    except MinServeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    for warning in model.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(description)


def _compile(handler: Path) -> None:
    """Finds what is no Python without running any; a shipped handler, or a module by its name, has no such file."""
    if not handler.is_file():
        return
    try:
        compile(handler.read_bytes(), handler, "exec", dont_inherit=True)
    except OSError as error:
        raise ConfigError(f"{handler}: cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:  # ValueError: a zero byte, before Python 3.12
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ConfigError(f"{handler}{line}: found a syntax error ({what}), allowed: Python") from None
