"""What the broadcast is built on: a link to a rank, the limits of a worker's batches, and a batch that is under way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from minserve.dispatch.request import Request
    from minserve.wire.messages import Answer, Buffer, Failure
    from minserve.worker.blame import Cause


class RankLink(Protocol):
    """What the broadcast needs of a link; `Link` in life, an in-memory one in tests."""

    rank: int
    pid: int
    has_room: bool

    def write(self, pieces: Sequence[Buffer], *, later: bool = False) -> None:
        """Queues a frame; one for `later` goes with what is written next, or with `flush`."""

    def flush(self) -> None:
        """Queues what was kept for later."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many batches may be under way, how long each may take, and how far a stream may be ahead. Times are seconds.

    Attributes:
        in_flight: None: as many as pay, see `Places`.
        stall_timeout: 0 is never.
        stream_ahead: steps; None: as many as pay, see `Streams`.
        stream_buffer: bytes that may wait for one client.
        any_order: the batches of a single rank are worked on beside each other: each has a limit of its own, and what nobody
            waits for any more is cancelled by itself.
    """

    in_flight: int | None
    response_timeout: float
    first_batch_timeout: float
    error_grace: float
    reply_after_all: bool = False
    stall_timeout: float = 0.0
    stream_ahead: int | None = None
    stream_buffer: int = 1024 * 1024
    any_order: bool = False


@dataclass(slots=True)
class Outstanding:
    """A batch that every rank has been sent. Without requests it is a probe.

    Attributes:
        limit: seconds it may take, or until the next chunk.
        due: when the worker fails for it; never while the ranks wait for a grant.
        granted: the step up to which its stream may go; `step` is the last that rank 0 has sent.
        burst: steps that came together, see `Streams`.
        failures: what ranks have reported, by rank, and the same as causes.
        leaving: the failure that its clients were told of: ranks leave it with that, or have left it before they knew.
        doubted_until: when the ranks that have not reported are taken for being elsewhere.
        error: what its clients were told.
        on_change: called when one of its clients keeps up again or has left.
        on_passed: called when every rank is through a probe.
        held: rank 0's reply, while other ranks' DONE is waited for.
        began, written: on the meters' clock, when its sending began and when it was in every rank's socket or behind it.
        seconds: that rank 0 was in `handle`, once it has answered.
    """

    seq: int
    requests: list[Request]
    limit: float = 0.0
    due: float = 0.0
    granted: int = 0
    step: int = 0
    burst: int = 1
    cancelled: bool = False
    error: str = ""
    on_change: Callable[[], None] | None = None
    on_passed: Callable[[], None] | None = None
    failures: dict[int, Failure] = field(default_factory=dict)
    causes: list[Cause] = field(default_factory=list)
    leaving: Failure | None = None
    doubted_until: float = math.inf
    held: list[tuple[Answer, Buffer]] | None = None
    done: set[int] = field(default_factory=set)
    began: float = 0.0
    written: float = 0.0
    seconds: float | None = None

    @property
    def waits_for_grant(self) -> bool:
        """Whether rank 0 has used up its grant: what it waits for are the clients."""
        return self.step >= self.granted
