"""`minserve stop`: ends a server of this user."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Annotated

import typer

from minserve.cli.ending import fail


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
        fail(f"several servers are running, choose one with --pid: {pids}")
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
    fail(f"pid {server.pid} still runs after {timeout:g} s")
