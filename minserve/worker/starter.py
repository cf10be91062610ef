"""Starts the processes of all workers: as forks of the warm launcher where that can be, else each by an exec of its own."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minserve.worker import launcher
from minserve.worker.warm import NotWarmError, WarmLauncher

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from minserve.worker.launcher import Launch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Child:
    """A process that was started.

    Attributes:
        output: what it prints, a non-blocking pipe; the caller's to close.
        reap: takes its exit status away once it has ended.
    """

    pid: int
    output: int
    reap: Callable[[], object]


class Starter:
    """One for a server, which `close` ends with it.

    Args:
        environ: what models' processes have of the server's environment.
        directory: the server's runtime directory.
    """

    def __init__(self, environ: Mapping[str, str], directory: Path) -> None:
        self.environ = environ
        self._directory = directory / "warm"
        self._warm: WarmLauncher | None = None
        self._unproven: set[str] = set()  # whose last start was a fork, of which nothing has connected yet

    async def start(self, launch: Launch, who: str) -> Child:
        """Starts a process.

        Args:
            who: "model/worker number" for messages.

        Raises:
            OSError: it cannot be started.
        """
        if launch.warm is not None and who in self._unproven:  # whatever a fork cannot do here, nobody shall wait for
            self._unproven.remove(who)
            logger.warning("%s: started without the warm launcher: what it had forked did not connect", who)
        elif launch.warm is not None and (warm := self._launcher(launch.patient)) is not None:
            try:
                forked = await warm.fork(launch)
                self._unproven.add(who)
                logger.debug(
                    "%s: pid %d forked by the warm launcher for: %s", who, forked.pid, " ".join(launch.command)
                )
                return Child(forked.pid, forked.output, lambda: _reap(forked.pid))
            except NotWarmError as error:
                logger.warning("%s: started without the warm launcher: %s", who, error)
        logger.debug("%s: %s", who, " ".join(launch.command))
        process = launcher.spawn(launch, self.environ)
        assert process.stdout is not None
        with process.stdout:
            return Child(process.pid, os.dup(process.stdout.fileno()), process.wait)

    def connected(self, who: str) -> None:
        """All that was started for it has come up: the next start may be a fork, too."""
        self._unproven.discard(who)

    def _launcher(self, patient: bool) -> WarmLauncher | None:
        """The launcher, if there is one or, for those who can wait, ought to be one."""
        warm = self._warm
        if not patient:
            return warm if warm is not None and warm.ready else None
        if warm is None or (warm.ended and not warm.useless):
            try:
                self._warm = warm = WarmLauncher(self.environ, self._directory)
            except OSError as error:
                logger.warning("the warm launcher cannot be started: %s", error)
                return None
        return None if warm.useless else warm

    async def close(self) -> None:
        """Ends the launcher."""
        if self._warm is not None:
            await self._warm.close()


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
