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

__all__ = ["DEMO_MODELS", "MODELS", "Answer", "RunningServer", "call", "gone", "server", "until"]

MODELS = Path(__file__).parent / "models"
DEMO_MODELS = Path(__file__).parents[2] / "configs" / "models"


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of them runs any more. A zombie does not run: who its parent is, is not the test's affair."""
    return not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


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
        until(lambda: gone(family), 5.0, "the ranks' end")
        left = list(running.runtime.glob("minserve-*"))
        assert running.process.returncode or not left, "the runtime directory is left"
