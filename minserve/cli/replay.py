"""`minserve replay`: recorded batches, played into a rank group of a model directory."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minserve.cli.ending import fail
from minserve.errors import MinServeError

if TYPE_CHECKING:
    from minserve.playlist import Playlist
    from minserve.replay import Replay


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
        fail(error)
    for warning in [*warnings, *playlist.notes]:
        typer.echo(f"minserve: {warning}", err=True)
    _replay(playlist, model_dir, nproc)


def _replay(playlist: Playlist, model_dir: Path, nproc: int | None) -> None:
    import uvloop

    from minserve.config.server import ServerOptions
    from minserve.registry.store import Location
    from minserve.registry.validating import validate_model
    from minserve.replay import Replay, with_ranks
    from minserve.telemetry import logging
    from minserve.worker.devices import read_inventory

    async def play() -> Replay:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)  # type: ignore[union-attr]
        played = Replay(spec, inventory, os.environ, typer.echo)
        await played.run(playlist.batches)
        return played

    log = None
    try:
        inventory = read_inventory(os.environ)
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
        fail(failure)
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
