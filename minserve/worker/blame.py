"""Who did it: finds the cause among everything that goes wrong when a rank group fails.

When one rank dies the others report collective errors, sometimes first, and torchrun SIGTERMs them. So causes are gathered
for a moment and ranked: a death outranks an exception; among deaths the agent's comes first, then the earliest that was not
by SIGTERM, or that torchrun names as the first; among exceptions one of a rank's own outranks a collective's, which most
likely is a victim's: even a rank that says nothing at all is more suspicious. Which one says nothing when several wait for
each other, `hang` finds out.
"""

from __future__ import annotations

import enum
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# Within which a dying process, whose socket is closed already, has its exit code: a busy machine may take its time.
SOCKET_GATHER_S = 0.25
DEATH_GATHER_S = 0.15  # torchrun looks at its ranks every 0.1 s: by then the siblings' deaths are in, too
SIGTERM_GATHER_S = 0.3  # it ends them by SIGTERM itself; then it ends, and tells which was the first
AGENT = -1  # stands where a rank's number would


class What(enum.IntEnum):
    """What kind of cause it is, worst first."""

    PROTOCOL = 0  # a rank sent what it must not: nothing it did later counts
    DEATH = 1
    EXCEPTION = 2
    PROBE = 3  # the handler's own check failed
    STALL = 4  # stopped, stuck in the kernel, or without a heartbeat
    SILENCE = 5  # no answer in time
    COLLECTIVE = 6


@dataclass(frozen=True, slots=True)
class Cause:
    """One thing that went wrong.

    Attributes:
        rank: global rank, or AGENT.
        pid: process id, 0 when it is not known.
        detail: what happened, to be read after "rank 1 (pid 4711)".
        at: when it was seen, on the server's clock.
        exit_code: of a death: as in `subprocess`, negative for a signal; None when nobody could read it.
        reported: torchrun names it as the first that it has seen.
    """

    what: What
    rank: int
    pid: int
    detail: str
    at: float
    exit_code: int | None = None
    reported: bool = False

    def __str__(self) -> str:
        who = "torchrun" if self.rank == AGENT else f"rank {self.rank}"
        return f"{who} (pid {self.pid}) {self.detail}" if self.pid else f"{who} {self.detail}"

    @property
    def is_consequence(self) -> bool:
        """Whether it is a death that another one brings about.

        torchrun SIGTERMs the siblings of a dead rank and then exits with 1 itself; only a signal ends it on its own account.
        """
        if self.what is not What.DEATH or self.reported:
            return False
        if self.rank == AGENT:
            return (self.exit_code or 0) >= 0
        return self.exit_code == -signal.SIGTERM


def culprit(causes: Iterable[Cause]) -> Cause:
    """The cause that explains the others. There must be at least one."""
    return min(causes, key=_order)


def _order(cause: Cause) -> tuple[int, bool, bool, float]:
    return (cause.what, cause.is_consequence, cause.rank != AGENT, cause.at)


def describe_exit(code: int | None) -> str:
    """A death in words, from an exit code as `subprocess` gives it."""
    if code is None:
        return "vanished"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was killed by {name}"
    return f"exited with code {code}"
