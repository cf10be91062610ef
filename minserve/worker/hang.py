"""Who hangs: finds the rank that the others wait for.

With tensor parallelism every rank of a batch that hangs has received it and not finished it, so progress alone names nobody.
Looked at, in this order: the process's state (stopped, in the kernel), the heartbeat, then each rank's Python stack. A rank
outside torch.distributed keeps those inside it waiting; so does one that has left the batch without their collective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.wire.board import HEARTBEAT_S
from minserve.worker.blame import Cause, What
from minserve.worker.processes import IN_THE_KERNEL, STOPPED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from minserve.worker.signs import Signs

# A heartbeat that stands still for so long when somebody looks is no accident of scheduling.
SILENT_S = 8 * HEARTBEAT_S


def find(group: Sequence[Signs], suspects: Sequence[int], seq: int, due: Cause) -> Cause:
    """The rank to blame for a hang.

    Args:
        group: all ranks.
        suspects: those of them that may be it: without those that have reported an exception.
        seq: the batch that does not end.
        due: what has been noticed; its detail says in which limit, its rank is blamed where nothing tells.
    """
    among = [signs for signs in group if signs.rank in suspects]
    waiting = [signs.rank for signs in group if signs.collective]

    def blame(signs: Signs, what: What, finding: str) -> Cause:
        noticed = f", and {due.detail}" if signs.rank == due.rank else f"; rank {due.rank} {due.detail}"
        return Cause(what, signs.rank, signs.pid, f"{finding}{noticed}", due.at)

    for found in (
        _first(among, lambda signs: signs.state in STOPPED, lambda _: "is stopped"),
        _first(among, lambda signs: signs.state == IN_THE_KERNEL, lambda _: "is stuck in the kernel"),
        _first(among, lambda signs: signs.silent >= SILENT_S, _no_heartbeat),
    ):
        if found is not None:
            return blame(found[0], What.STALL, found[1])
    behind = [signs for signs in among if signs.vitals.finished < seq]
    outside = [signs for signs in behind if signs.stack is not None and not signs.collective]
    if outside:
        # Of several the one that has issued the fewest collectives: the others may wait for one of theirs by themselves.
        signs = min(outside, key=lambda signs: (signs.vitals.collectives, signs.rank != due.rank, signs.rank))
        where = f"is outside torch.distributed, {signs.stack}" if waiting else f"is {signs.stack}"
        return blame(signs, What.SILENCE, f"{where}{_while(waiting, ' while {} in a collective')}")
    left = [signs for signs in among if signs.vitals.finished >= seq]
    if left and waiting:
        return blame(left[0], What.SILENCE, f"has left batch {seq}{_while(waiting, ' while {} in a collective of it')}")
    if waiting and len(waiting) == len(group):
        signs = min(among, key=lambda signs: (signs.vitals.collectives, signs.rank != due.rank, signs.rank))
        finding = f"waits in a collective as all ranks do, after {signs.vitals.collectives} of them"
        return blame(signs, What.SILENCE, finding)
    return due


def _first(
    group: Sequence[Signs], matches: Callable[[Signs], bool], finding: Callable[[Signs], str]
) -> tuple[Signs, str] | None:
    return next(((signs, finding(signs)) for signs in group if matches(signs)), None)


def _no_heartbeat(signs: Signs) -> str:
    at = f" ({signs.stack})" if signs.stack is not None else ""
    return f"has had no heartbeat for {signs.silent:.1f} s, some C code holds the GIL{at}"


def _while(ranks: Sequence[int], text: str) -> str:
    """`text` about these ranks; nothing if there are none."""
    if not ranks:
        return ""
    several = len(ranks) > 1
    return text.format(f"rank{'s' * several} {', '.join(map(str, ranks))} {'wait' if several else 'waits'}")
