"""`minserve archive`: makes an archive."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minserve.cli.ending import fail
from minserve.errors import ConfigError


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
        fail(error)
    typer.echo(path)
