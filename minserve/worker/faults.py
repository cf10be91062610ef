"""Under which kind a worker's fault stands among the events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.telemetry.events import EventKind
from minserve.worker.blame import AGENT, What
from minserve.worker.states import State

if TYPE_CHECKING:
    from minserve.worker.blame import Cause

_KINDS = {
    What.PROTOCOL: EventKind.PROTOCOL,
    What.DEATH: EventKind.RANK_DIED,
    What.EXCEPTION: EventKind.RANK_RAISED,
    What.PROBE: EventKind.PROBE_FAILED,
    What.STALL: EventKind.RANK_STALLED,
    What.SILENCE: EventKind.TIMEOUT,
    What.COLLECTIVE: EventKind.RANK_RAISED,
}


def kind_of_fault(cause: Cause | None, state: State) -> EventKind:
    """One kind for one fault.

    Args:
        cause: who did it; None where it was no rank and not the agent.
        state: the worker's when it happened.
    """
    starts = state in (State.STARTING, State.CONNECTING, State.LOADING)
    if cause is None or (starts and cause.what in (What.EXCEPTION, What.COLLECTIVE, What.SILENCE)):
        return EventKind.START_FAILED
    if cause.what is What.DEATH and cause.rank == AGENT:
        return EventKind.AGENT_DIED
    return _KINDS[cause.what]
