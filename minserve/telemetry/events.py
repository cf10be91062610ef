"""What has happened to a model's workers: a bounded ring of structured events, for `/models/{model}/events` and the CLI.

An event is something that an operator would want to see next morning: a fault, a restart, a change of scale. What happens
with each request is none.
"""

from __future__ import annotations

import enum
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMA = 1  # of an event as JSON; goes up when a field changes its meaning
SIZE = 500  # events that a model keeps
FROM_CLIENTS = 100  # of those that any client can cause, as many as it likes


class EventKind(enum.StrEnum):
    """What kind of event it is."""

    READY = "ready"  # a worker has become READY
    HANDLER_ERROR = "handler-error"  # the handler raised on all ranks alike; the worker goes on
    RANK_DIED = "rank-died"
    AGENT_DIED = "agent-died"
    RANK_RAISED = "rank-raised"  # on some ranks only, or from a collective or device: the group is lost
    RANK_STALLED = "rank-stalled"  # stopped, or without a heartbeat
    TIMEOUT = "timeout"  # a batch did not finish within responseTimeout
    PROTOCOL = "protocol"  # a rank sent what it must not
    PROBE_FAILED = "probe-failed"
    START_FAILED = "start-failed"  # did not connect or load in time, or could not be launched
    RESTART = "restart"  # a worker will be started again after a back-off
    GIVEN_UP = "given-up"
    REVIVED = "revived"
    SCALED = "scaled"
    RELOADED = "reloaded"
    RELOAD_FAILED = "reload-failed"
    STREAM_CANCELLED = "stream-cancelled"  # all clients of a stream have left, and the ranks were stopped in step


_CLIENTS = frozenset({EventKind.HANDLER_ERROR, EventKind.STREAM_CANCELLED})


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Attributes:
        at: seconds since the epoch, when it was seen; of several alike the latest.
        worker: number of the worker, None when it is about the model.
        rank: global rank; -1 for torchrun, None when it is about no rank.
        pid: of that process, 0 when it is about none.
        detail: one sentence.
        count: how many alike have come in a row.
    """

    at: float
    model: str
    kind: EventKind
    detail: str
    worker: int | None = None
    rank: int | None = None
    pid: int = 0
    count: int = 1


class EventLog:
    """The latest events of one model version, oldest first.

    Args:
        on_event: told each of them as it happens.

    Attributes:
        counts: how many there have been of each kind.
    """

    def __init__(
        self,
        model: str,
        size: int = SIZE,
        now: Callable[[], float] = time.time,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self._model = model
        self._now = now
        self._on_event = on_event
        self.counts: Counter[EventKind] = Counter()
        self._faults: deque[Event] = deque(maxlen=size)
        self._from_clients: deque[Event] = deque(maxlen=FROM_CLIENTS)

    def record(
        self, kind: EventKind, detail: str, worker: int | None = None, rank: int | None = None, pid: int = 0
    ) -> None:
        """Adds an event. One like the latest takes its place and counts.

        A handler's errors are alike whatever they say. What clients cause has a ring of its own, and pushes no death out.
        """
        event = Event(self._now(), self._model, kind, detail, worker, rank, pid)
        self.counts[kind] += 1
        if self._on_event is not None:
            self._on_event(event)
        events = self._from_clients if kind in _CLIENTS else self._faults
        if events:
            latest = events[-1]
            same_detail = detail == latest.detail or kind is EventKind.HANDLER_ERROR
            if same_detail and replace(latest, at=event.at, detail=detail, count=1) == event:
                event = replace(event, count=latest.count + 1)
                events.pop()
        events.append(event)

    def latest(self, most: int = SIZE) -> list[Event]:
        """The last `most` events, oldest first."""
        events = sorted((*self._faults, *self._from_clients), key=lambda event: event.at)
        return events[-most:] if most > 0 else []
