"""What can be seen of ranks that do not answer: process state, heartbeat, progress, Python stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minserve.worker import stacks
from minserve.worker.processes import IN_THE_KERNEL, process_state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from minserve.wire.board import Vitals
    from minserve.worker.site import Site
    from minserve.worker.stacks import Stack


@dataclass(frozen=True, slots=True)
class Signs:
    """What can be seen of a rank that does not answer.

    Attributes:
        state: of its process, one letter, "" when it is gone.
        silent: seconds without a heartbeat.
        stack: None when it could not be had.
    """

    rank: int
    pid: int
    state: str
    silent: float
    vitals: Vitals
    stack: Stack | None

    @property
    def collective(self) -> bool:
        """Whether it is inside torch.distributed."""
        return self.stack is not None and self.stack.collective

    def __str__(self) -> str:
        vitals = self.vitals
        return (
            f"rank {self.rank} (pid {self.pid}): process state {self.state or 'gone'}, "
            f"no heartbeat for {self.silent:.1f} s, batch {vitals.received} begun, {vitals.finished} finished, "
            f"{vitals.collectives} collectives issued"
        )


async def look(site: Site, pids: Mapping[int, int], silent: Sequence[float]) -> list[Signs]:
    """The signs of each rank that has said HELLO, by rank; none if the group is killed meanwhile.

    Args:
        silent: seconds without a heartbeat, by rank; empty before anybody has counted them.
    """
    before = {rank: process_state(pid) for rank, pid in pids.items()}
    found = await stacks.ask(site.path, pids)
    if site.board is None:
        return []
    signs = []
    for rank, pid in sorted(pids.items()):
        state = process_state(pid)
        if state == IN_THE_KERNEL != before[rank]:
            state = before[rank]  # for a moment, as any process is now and then
        signs.append(Signs(rank, pid, state, silent[rank] if silent else 0.0, site.board.read(rank), found.get(rank)))
    return signs
