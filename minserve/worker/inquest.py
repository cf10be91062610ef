"""The inquest on a rank group: what its sockets, the board and the kernel tell, and the error that follows from it."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING

from minserve.errors import RankProtocolError, ResponseTimeout, WorkerFailed, WorkerOutOfMemory
from minserve.worker import hang
from minserve.worker.blame import AGENT, DEATH_GATHER_S, SIGTERM_GATHER_S, SOCKET_GATHER_S, Cause, What, describe_exit
from minserve.worker.oom import OutOfMemory
from minserve.worker.signs import look
from minserve.worker.verdict import HANGS, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from minserve.wire.messages import Failure
    from minserve.worker.link import Link
    from minserve.worker.loading import Loading
    from minserve.worker.members import Members
    from minserve.worker.signs import Signs
    from minserve.worker.site import Site
    from minserve.worker.spec import ModelSpec

logger = logging.getLogger(__name__)

EXIT_OUT_OF_MEMORY = 137  # 128 + SIGKILL: how a shell, and so a container, tells of the kernel's out-of-memory killer
REPORT_GATHER_S = 5.0  # in which torchrun, which ends soon after one of its ranks, has told of the first that ended
_ERRORS = {What.PROTOCOL: RankProtocolError, What.SILENCE: ResponseTimeout, What.STALL: ResponseTimeout}


class Inquest:
    """Turns what happens to a group into causes, and the culprit into the error that requests get.

    Args:
        who: "model/worker number" for messages.
        exceptions: the causes that the broadcast has gathered.
        silent: seconds without a heartbeat, by rank; empty before anybody has counted them.
        on_error: called once, with the culprit and the error.
    """

    def __init__(
        self,
        spec: ModelSpec,
        who: str,
        site: Site,
        members: Members,
        loading: Loading,
        exceptions: Callable[[], list[Cause]],
        silent: Callable[[], list[float]],
        on_error: Callable[[Cause, WorkerFailed], None],
    ) -> None:
        self._spec = spec
        self._who = who
        self._site = site
        self._members = members
        self._loading = loading
        self._exceptions = exceptions
        self._silent = silent
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        self._verdict = Verdict(exceptions, self._look_closer, self._judged)
        self._out_of_memory = OutOfMemory(self._loop)

    @property
    def pending(self) -> bool:
        """Whether something is wrong, and it has not been decided yet what."""
        return self._verdict.pending

    def adjourn(self) -> None:
        """Nothing is decided any more."""
        self._verdict.close()

    def close(self) -> None:
        """Nothing is decided any more, and nothing is looked at."""
        self._verdict.close()
        self._out_of_memory.close()

    # ── what happens ──

    def lost(self, link: Link, reason: str | None) -> None:
        """A link has ended; `reason` is how its rank broke the protocol, if it did."""
        what = What.DEATH if reason is None else What.PROTOCOL
        detail = "closed its socket" if reason is None else f"broke the protocol: {reason}"
        cause = Cause(what, link.rank, link.pid, detail, self._loop.time())
        self._verdict.suspect(cause, final=reason is not None, gather=SOCKET_GATHER_S)

    def exited(self, rank: int, pid: int, code: int | None) -> None:
        """A process has ended: a rank, or the agent, which may have seen another end first."""
        agent = pid == self._members.agent_pid
        if agent and (first := self._site.first_failure()):
            self._died(first.rank, first.pid, first.code, reported=True)
        self._died(rank, pid, code)

    def _died(self, rank: int, pid: int, code: int | None, *, reported: bool = False) -> None:
        cause = Cause(What.DEATH, rank, pid, describe_exit(code), self._loop.time(), code, reported)
        # SIGKILL may be the agent's death signal, and then the agent's own end is a moment away.
        final = not cause.is_consequence and (rank == AGENT or code != -signal.SIGKILL)
        # A rank that has not come yet may have ended first, and only torchrun has seen it.
        gather = SIGTERM_GATHER_S if cause.is_consequence else DEATH_GATHER_S
        if rank != AGENT and self._incomplete:
            gather = REPORT_GATHER_S
        self._verdict.suspect(cause, final=final, gather=gather)

    @property
    def _incomplete(self) -> bool:
        return len(self._members.pids) < self._spec.world_size

    def load_failed(self, link: Link, failure: Failure) -> None:
        """A rank cannot load."""
        victim = failure.kind == "collective"
        what = What.COLLECTIVE if victim else What.EXCEPTION
        cause = Cause(what, link.rank, link.pid, f"cannot load: {failure.type_name}: {failure.text}", self._loop.time())
        grace = self._spec.config.minserve.error_grace if victim else 0.0
        self._verdict.suspect(cause, final=not victim, gather=grace)

    def broken(self, cause: Cause, seq: int) -> None:
        """The batch `seq` has not ended as it should."""
        if cause.what in HANGS:
            self._verdict.suspect_hang(cause, seq)
        else:
            self._verdict.suspect(cause, final=True)

    # ── who did it ──

    async def _look_closer(self, noticed: Cause, seq: int) -> Cause:
        suspects = set(range(self._spec.world_size)) - {cause.rank for cause in self._exceptions()}
        return hang.find(await self.signs(), sorted(suspects), seq, noticed)

    async def signs(self) -> list[Signs]:
        """What can be seen of each rank that has come; logged."""
        seen = await look(self._site, self._members.pids, self._silent())
        for one in seen:
            logger.error("%s: %s\n%s", self._who, one, one.stack.text.rstrip() if one.stack else "    no stack")
        return seen

    def _judged(self, cause: Cause) -> None:
        kind, hint = _ERRORS.get(cause.what, WorkerFailed), ""
        if cause.exit_code == EXIT_OUT_OF_MEMORY:
            kind = WorkerOutOfMemory
        elif cause.exit_code == -signal.SIGKILL and self._out_of_memory.lately():
            kind, hint = WorkerOutOfMemory, ": the kernel's out-of-memory killer was at work"
        raised = self._loading.errors.get(cause.rank, "")
        self._on_error(cause, kind(f"{self._who}: {cause}{hint}", self.last_lines([cause.rank]), raised))

    def last_lines(self, ranks: list[int]) -> tuple[str, ...]:
        """The last lines that the ranks printed; torchrun's, too, where one has not come as far as its own pipe."""
        silent = any(rank not in self._members.pids for rank in ranks)
        sources = dict.fromkeys([*ranks, AGENT] if silent else ranks)
        return self._site.last_lines(sources)
