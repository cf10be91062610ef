"""Starts servers of our own test models with `minserve.testing`, and makes sure that nothing of them stays behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from minserve.testing import Answer, until
from minserve.testing.answers import call
from minserve.testing.running import RunningServer, running_server

__all__ = ["DEMO_MODELS", "GONE_S", "MODELS", "Answer", "RunningServer", "call", "gone", "server", "state_of", "until"]

MODELS = Path(__file__).parent / "models"
DEMO_MODELS = Path(__file__).parents[2] / "configs" / "models"
GONE_S = 10.0  # ends take less than two seconds; the machine may be busy with another file's servers


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of them runs any more. A zombie does not run: who its parent is, is not the test's affair."""
    return all(state_of(one) in (None, psutil.STATUS_ZOMBIE) for one in processes)


def state_of(process: psutil.Process) -> str | None:
    """In what state it is, as psutil calls it; None when it is no more, or goes just while one looks."""
    try:
        return process.status() if process.is_running() else None
    except psutil.NoSuchProcess:
        return None


@contextmanager
def server(
    *models: Path, options: tuple[str, ...] = (), environ: Mapping[str, str] | None = None, started: bool = True
) -> Iterator[RunningServer]:
    """A server of these model directories. At the end it is stopped, and nothing of it may be left."""

    def link(store: Path) -> None:
        for model in models:
            (store / model.name).symlink_to(model)

    with running_server(link, options, environ) as running:
        if started:
            running.wait_until_started()
        yield running
        family = running.family() if running.process.poll() is None else []
        assert running.stop() in (0, -signal.SIGKILL), running.log
        until(lambda: gone(family), GONE_S, "the ranks' end")
        left = list(running.runtime.glob("minserve-*"))
        assert running.process.returncode or not left, "the runtime directory is left"
