"""How a command ends: by one line on stderr and exit status 1, or by a signal."""

from __future__ import annotations

import signal
from typing import NoReturn

import typer


def fail(message: object) -> NoReturn:
    """One line that says why, and exit status 1."""
    typer.echo(f"minserve: {message}", err=True)
    raise typer.Exit(1)


def obey_signals() -> None:
    """As any command does: Ctrl-C shall not look like success. See __main__."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
