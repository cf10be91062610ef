"""The state machine of a worker, as a table: what each trigger does in each state.

STARTING → CONNECTING → LOADING → READY ⇄ BUSY → DRAINING → STOPPED
    ↑          └───────────┴────────┴───────┴─────────→ FAILED ─┐
    └──────────────────────── back-off ─────────────────────────┘
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class State(enum.StrEnum):
    """Where a worker is in its life."""

    STARTING = "STARTING"
    CONNECTING = "CONNECTING"
    LOADING = "LOADING"
    READY = "READY"
    BUSY = "BUSY"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"


class Trigger(enum.StrEnum):
    """What happens to a worker."""

    START = "start"  # its supervisor wants a rank group
    LAUNCHED = "launched"
    CONNECTED = "connected"  # by all ranks
    LOADED = "loaded"  # by all ranks, and probed
    FAIL = "fail"  # the rank group is lost, or could not be started
    DRAIN = "drain"  # no new batches, those in flight finish
    ENDED = "ended"  # nothing of it runs any more, and that was wanted


class Otherwise(enum.Enum):
    """What a trigger does that leads to no other state."""

    IGNORED = "ignored"  # it may come at any time, and means nothing here
    REFUSED = "refused"  # it cannot come here; if it does, that is a bug of ours


_S, _I, _R = State, Otherwise.IGNORED, Otherwise.REFUSED
_ORDER = (
    *(Trigger.START, Trigger.LAUNCHED, Trigger.CONNECTED, Trigger.LOADED),
    *(Trigger.FAIL, Trigger.DRAIN, Trigger.ENDED),
)
# A failure while draining changes nothing: the group is being ended, and has answered its requests itself. A drain where
# nothing can be in flight has nothing to wait for.
_ROWS: Mapping[State, tuple[State | Otherwise, ...]] = {
    #                 START        LAUNCHED       CONNECTED   LOADED    FAIL       DRAIN        ENDED
    State.STOPPED:    (_S.STARTING, _R,            _R,         _R,       _I,        _I,          _I),
    State.STARTING:   (_R,          _S.CONNECTING, _R,         _R,       _S.FAILED, _I,          _S.STOPPED),
    State.CONNECTING: (_R,          _R,            _S.LOADING, _R,       _S.FAILED, _I,          _S.STOPPED),
    State.LOADING:    (_R,          _R,            _R,         _S.READY, _S.FAILED, _I,          _S.STOPPED),
    State.READY:      (_R,          _R,            _R,         _R,       _S.FAILED, _S.DRAINING, _S.STOPPED),
    State.DRAINING:   (_R,          _R,            _R,         _R,       _I,        _I,          _S.STOPPED),
    State.FAILED:     (_S.STARTING, _R,            _R,         _R,       _I,        _I,          _S.STOPPED),
}  # fmt: skip

# BUSY is READY with a batch under way. Nothing enters or leaves it: it is looked up when somebody asks, so that a batch
# costs the state machine nothing.
TRANSITIONS: Mapping[State, Mapping[Trigger, State | Otherwise]] = {
    state: dict(zip(_ORDER, _ROWS[State.READY if state is State.BUSY else state], strict=True)) for state in State
}


def after(state: State, trigger: Trigger) -> State:
    """The state that a trigger leads to.

    Raises:
        AssertionError: it cannot come in that state.
    """
    to = TRANSITIONS[state][trigger]
    if to is Otherwise.REFUSED:
        raise AssertionError(f"{trigger} makes no sense in {state}")
    return state if to is Otherwise.IGNORED else to
