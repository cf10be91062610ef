"""What operators are shown of a worker and its ranks."""

from __future__ import annotations

from dataclasses import dataclass

from minserve.worker.states import State


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank as operators see it."""

    rank: int
    pid: int
    endpoint: str
    progress: str


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker as operators see it. Times are seconds since the epoch.

    Attributes:
        answers_held: bytes of its answers in shared memory that clients have not got yet.
    """

    number: int
    state: State
    started_at: float
    restarts: int
    devices: str | None
    agent_pid: int
    ranks: tuple[RankReport, ...]
    last_error: str
    last_error_at: float
    last_lines: tuple[str, ...]
    answers_held: int = 0

    @property
    def serving(self) -> bool:
        """Whether it takes batches."""
        return self.state in (State.READY, State.BUSY)
