"""What a person sees on the terminal: the start of a server as it goes on, and the table of `minserve status`."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

import minserve

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from minserve.registry.models import ServedModel
    from minserve.server import Server

REFRESH_S = 0.125


async def watch_start(server: Server, say: Callable[[str], None] = print) -> None:
    """Shows the load of every rank until each model serves or has failed once, then the URLs and a curl to try.

    On a terminal the ranks stand in a live table; elsewhere the log's plain lines tell the same.

    Args:
        say: prints the last lines; must not wait for whoever reads stdout.
    """
    await server.listening.wait()
    if sys.stdout.isatty():
        began = time.monotonic()
        with Live(_load_table(server, 0.0), auto_refresh=False, transient=True) as live:
            while not _settled(server):
                await asyncio.sleep(REFRESH_S)
                live.update(_load_table(server, time.monotonic() - began), refresh=True)
    else:
        while not _settled(server):
            await server.changed.wait()
            server.changed.clear()
    say(_summary(server))


def _settled(server: Server) -> bool:
    return all(_serves(model) or _has_failed(model) or not model.workers for model in server.registry.models())


def _serves(model: ServedModel) -> bool:
    return any(report.serving for report in model.supervisor.report())


def _has_failed(model: ServedModel) -> bool:
    return any(report.last_error for report in model.supervisor.report())


def _load_table(server: Server, seconds: float) -> Table:
    table = Table(title=f"minserve {minserve.__version__}, starting for {seconds:.0f} s", title_justify="left")
    for column in ("model", "worker", "state", "rank", "pid", "load"):
        table.add_column(column)
    for model in server.registry.models():
        for report in model.supervisor.report():
            row = (model.spec.title, str(report.number), str(report.state))
            for rank in report.ranks:
                table.add_row(*row, str(rank.rank), str(rank.pid or "-"), rank.progress)
            if not report.ranks:
                table.add_row(*row, "-", "-", report.last_error)
    return table


def _summary(server: Server) -> str:
    lines = [f"minserve {minserve.__version__}"]
    example = None
    for model in server.registry.models():
        name, reports = model.spec.title, model.supervisor.report()
        if _serves(model):
            example = example or model.spec.name
            ranks = f"{model.workers} x {model.spec.world_size} ranks" if model.spec.world_size > 1 else "one process"
            lines.append(f"  {name}: ready, {ranks}")
        else:
            reason = next((report.last_error for report in reports if report.last_error), "")
            lines.append(f"  {name}: not ready: {reason}" if model.workers else f"  {name}: no worker")
    lines += [f"  {name}: its configuration is wrong, see above" for name in server.registry.broken]
    lines += [f"inference   {server.inference_url}", f"management  {server.management_url}"]
    if server.metrics_url:
        lines.append(f"metrics     {server.metrics_url}/metrics")
    if example is not None:
        path = _for_curl(server.inference_url, f"/predictions/{example}")
        lines.append(f"try         curl {path} -H 'Content-Type: text/plain' -d 'Hello, ranks!'")
    return "\n".join(lines)


def _for_curl(url: str, path: str) -> str:
    if url.startswith("unix:"):
        return f"--unix-socket {url.removeprefix('unix:')} http://localhost{path}"
    return f"{'-k ' if url.startswith('https:') else ''}{url}{path}"


def print_status(url: str, models: Sequence[Mapping[str, object]]) -> None:
    """Prints what `/models/{model}` says of each model, one row a rank, and its latest events."""
    table = Table(title=url, title_justify="left")
    for column in ("model", "version", "worker", "state", "rank", "pid", "endpoint", "restarts", "last error"):
        table.add_column(column, overflow="fold")
    for model in models:
        workers = model.get("workers")
        for worker in workers if isinstance(workers, list) else []:
            head = [
                str(model.get("modelName", "")),
                str(model.get("modelVersion", "")),
                str(worker["id"]),
                str(worker["state"]),
            ]
            tail = [str(worker["restarts"]), str(worker.get("lastError", ""))]
            for rank in worker["ranks"] or [{"rank": "-", "pid": "-", "endpoint": "-"}]:
                table.add_row(*head, str(rank["rank"]), str(rank["pid"]), str(rank["endpoint"]), *tail)
                head, tail = ["", "", "", ""], ["", ""]
        if not workers and model.get("lastError"):
            table.add_row(str(model.get("modelName", "")), "", "", "BROKEN", "", "", "", "", str(model["lastError"]))
        if model.get("unhealthy"):
            table.add_row(str(model.get("modelName", "")), "", "", "UNHEALTHY", "", "", "", "", str(model["unhealthy"]))
    events = _event_table(models)
    width = None if sys.stdout.isatty() else 200  # a pipe has no width, and 80 columns would fold every cell
    console = Console(width=width)
    console.print(table)
    if events.row_count:
        console.print(events)


def _event_table(models: Sequence[Mapping[str, object]]) -> Table:
    table = Table(title="latest events", title_justify="left")
    for column in ("time", "model", "worker", "rank", "pid", "event", "detail"):
        table.add_column(column, overflow="fold")
    for model in models:
        events = model.get("events")
        for event in events if isinstance(events, list) else []:
            about = ["-" if event[key] is None else str(event[key]) for key in ("worker", "rank")]
            kind = str(event["kind"]) if event["count"] == 1 else f"{event['kind']} (x{event['count']})"
            pid = str(event["pid"] or "-")
            table.add_row(str(event["time"]), str(event["model"]), *about, pid, kind, str(event["detail"]))
    return table
