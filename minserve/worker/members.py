"""The processes of one rank group: torchrun and its ranks, watched until the last one has ended."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from minserve.errors import WorkerFailed
from minserve.worker.processes import Watch, kill_leftovers, kill_tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from minserve.worker.launcher import Launch
    from minserve.worker.site import Site
    from minserve.worker.starter import Child, Starter

logger = logging.getLogger(__name__)

GONE_S = 5.0  # after SIGKILL; only a process stuck in the kernel takes longer


class Members:
    """Starts the agent, takes note of its ranks, ends them all.

    Args:
        who: "model/worker number" for messages.
        incarnation: the mark in the environment of all of them.
        agent: what the first process counts as: AGENT, or 0 where it is the only rank itself.
        on_exit: called with rank, pid and exit code of each that ends; the code as in `subprocess`, None if nobody read it.

    Attributes:
        agent_pid: 0 before the start.
        pids: of the ranks that have said HELLO, by rank.
    """

    def __init__(self, who: str, incarnation: str, agent: int, on_exit: Callable[[int, int, int | None], None]) -> None:
        self._who = who
        self._incarnation = incarnation
        self._agent = agent
        self._on_exit = on_exit
        self._agent_process: Child | None = None
        self._watches: list[Watch] = []
        self.agent_pid = 0
        self.pids: dict[int, int] = {}

    async def start(self, launch: Launch, starter: Starter, site: Site) -> None:
        """Starts the agent; `site` reads what it prints.

        Raises:
            WorkerFailed: the process cannot be started.
        """
        try:
            self._agent_process = await starter.start(launch, self._who)
        except OSError as error:
            raise WorkerFailed(f"{self._who}: cannot start {launch.command[0]}: {error}") from None
        self.agent_pid = self._agent_process.pid
        site.read_agent(self._agent_process.output)
        self._watches.append(Watch(self.agent_pid, self._agent_exited))

    def add(self, rank: int, pid: int) -> None:
        """A rank has said HELLO."""
        logger.debug("%s: rank %d (pid %d) connected", self._who, rank, pid)
        self.pids[rank] = pid
        # A process without torchrun is its own agent, and watched as such already.
        if pid != self.agent_pid:
            self._watches.append(Watch(pid, lambda code: self._on_exit(rank, pid, code)))

    def _agent_exited(self, code: int | None) -> None:
        assert self._agent_process is not None
        self._agent_process.reap()  # it is a zombie now, so this does not block
        self._on_exit(self._agent, self.agent_pid, code)

    async def ranks_gone(self, timeout: float) -> None:
        """Waits until the ranks have ended. Not for torchrun, which has nothing to finish."""
        await self._gone(timeout, self._watches[1:] or self._watches)

    async def kill(self) -> None:
        """Kills every process, and what they have started, and waits for their end."""
        if self.agent_pid:
            kill_tree(self.agent_pid, self.pids.values())
            await self._gone(GONE_S, self._watches)
            kill_leftovers(self._incarnation)
        for watch in self._watches:
            watch.close()

    async def _gone(self, timeout: float, watches: list[Watch]) -> None:
        try:
            async with asyncio.timeout(timeout):
                for watch in watches:
                    await watch.ended.wait()
        except TimeoutError:
            left = ", ".join(str(watch.pid) for watch in watches if not watch.ended.is_set())
            logger.warning("%s: still running after %g s: pid %s", self._who, timeout, left)
