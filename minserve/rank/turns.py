"""Whose turn it is where several batches are under way on a rank: one of them at a time runs the handler's code.

A batch starts in the order of seq, pauses when it waits for the later stages of its pipeline, and goes on when its result
has come, perhaps several times. So handlers need no locks.

Ranks that share a stage issue collectives in it, so all must take the same moves in the same order. The first of them
decides and tells the others; a rule that each followed by itself would hang on whose frame or result came first.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable


class Move(NamedTuple):
    """A batch's turn: it starts, or it goes on with its result."""

    seq: int
    starts: bool


class Ticket(NamedTuple):
    """What a result belongs to: the run-th run of the pipeline in batch `seq`, both from 1; seq 0 is outside of batches."""

    seq: int
    run: int

    def __str__(self) -> str:
        return f"run {self.run} of batch {self.seq}"


class Result(Protocol):
    """What comes out of the pipeline."""

    @property
    def ticket(self) -> Ticket:
        """What it belongs to."""


R = TypeVar("R", bound=Result)


class Turns:
    """Hands out the turns. Every method may be called from any thread.

    Args:
        tell: passes each move on to the ranks that follow this one; None: there are none.
        follows: the moves come from another rank, through `hear`.

    Attributes:
        alone: no batch starts while another one is under way.
    """

    def __init__(self, tell: Callable[[Move], None] | None = None, *, follows: bool = False) -> None:
        self._tell = tell
        self._follows = follows
        self.alone = False
        self._changed = threading.Condition()
        self._holder = 0  # seq of the batch whose turn it is, 0 for nobody's
        self._started = 0
        self._waiting: dict[int, bool] = {}  # batches that are to start; the value: apart from all others
        self._apart = 0  # one that was started so
        self._paused: dict[int, Ticket] = {}  # batches that wait for a result
        self._results: dict[int, Result] = {}  # for those of them that may go on, in the order in which they came
        self._receiving = False
        self._failed: set[int] = set()  # until the server knows that every rank has left them
        self._heard: Move | None = None
        self._broken: BaseException | None = None
        self._stopping = False
        self._aborted: BaseException | None = None

    # ── a batch ──

    def announce(self, seq: int, *, apart: bool = False) -> None:
        """A batch is there, and will start.

        Args:
            apart: it is to run while no other batch is under way.
        """
        with self._changed:
            self._waiting[seq] = apart
            self._changed.notify_all()

    def start(self, seq: int) -> None:
        """Waits for a batch's first turn: those before it have had theirs, and none has failed that is not settled."""
        with self._changed:
            self._take(Move(seq, True))
            self._started = seq
            self._apart = seq if self._waiting.pop(seq) else 0

    def pause(self, ticket: Ticket, receive: Callable[[], R]) -> R:
        """Gives the turn up, waits for the batch's result, and for its turn to go on with it.

        Args:
            receive: waits for the next result, of whichever batch. One thread at a time calls it.

        Raises:
            BaseException: what `receive`, or the rank that decides, came to. Whoever waits gets it.
        """
        seq = ticket.seq
        with self._changed:
            self._holder = 0
            self._paused[seq] = ticket
            self._changed.notify_all()
            try:
                self._await_result(seq, receive)
                self._take(Move(seq, False))
                return cast("R", self._results.pop(seq))  # of one pipeline, so of one kind
            except BaseException:
                self._changed.wait_for(lambda: not self._holder)
                self._holder = seq  # the handler's own clean-up runs now
                raise
            finally:
                del self._paused[seq]

    def keep(self, ticket: Ticket, receive: Callable[[], R]) -> R:
        """The same without giving the turn up."""
        seq = ticket.seq
        with self._changed:
            self._paused[seq] = ticket
            try:
                self._await_result(seq, receive)
                return cast("R", self._results.pop(seq))  # of one pipeline, so of one kind
            finally:
                del self._paused[seq]

    def end(self, seq: int, *, failed: bool = False) -> None:
        """The batch is over. After a failure none starts, and no later one goes on, before `settle`."""
        with self._changed:
            self._holder = 0
            if failed:
                self._failed.add(seq)
            self._changed.notify_all()

    def settle(self, seq: int) -> None:
        """Every rank has left the batch that failed."""
        with self._changed:
            self._failed.discard(seq)
            self._changed.notify_all()

    # ── the rank ──

    def stop(self) -> None:
        """No further batch comes."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def abort(self, error: BaseException) -> None:
        """The rank ends at once: the error is raised where the end is waited for."""
        with self._changed:
            self._aborted = self._aborted or error
            self._changed.notify_all()

    def wait_for_end(self) -> None:
        """Waits until it was stopped and no batch is under way.

        Raises:
            BaseException: what it was aborted with.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._aborted or (self._stopping and not self._under_way))
        if self._aborted is not None:
            raise self._aborted

    def wait_for_move(self) -> bool:
        """Waits until the rank that decides has a move to tell; False if the end has come."""

        def due() -> bool:
            return not self._holder and self._heard is None and bool(self._waiting or self._paused)

        with self._changed:
            self._changed.wait_for(lambda: due() or (self._stopping and not self._under_way))
            return due()

    def hear(self, move: Move) -> None:
        """The next move, from the rank that decides."""
        with self._changed:
            self._heard = move
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Nobody can go on any more: the error is raised wherever a result is waited for."""
        with self._changed:
            self._broken = self._broken or error
            self._changed.notify_all()

    # ── inside, with the lock ──

    @property
    def _under_way(self) -> bool:
        return bool(self._holder or self._waiting or self._paused or self._failed)

    def _take(self, move: Move) -> None:
        while self._next() != move:
            if (
                self._broken is not None and not move.starts
            ):  # what has not started waits for the server to end this rank
                raise self._broken
            self._changed.wait()
        self._holder, self._heard = move.seq, None
        if self._tell is not None:
            try:
                self._tell(move)
            except (
                Exception
            ) as error:  # a rank of this stage is gone; the server knows why, and is about to end this one
                self._broken = self._broken or error

    def _next(self) -> Move | None:
        """The next move; None while nothing can move."""
        if self._holder:
            return None
        if self._follows:
            return self._heard if self._heard is not None and self._may(self._heard) else None
        ready = next(iter(self._results), None)  # first, for an answer that is all but ready should leave
        moves = [] if ready is None else [Move(ready, False)]
        if self._started + 1 in self._waiting and not self._holds_back(self._started + 1):
            moves.append(Move(self._started + 1, True))
        return next(filter(self._may, moves), None)

    def _may(self, move: Move) -> bool:
        return not self._failed if move.starts else not any(seq < move.seq for seq in self._failed)

    def _holds_back(self, seq: int) -> bool:
        """Whether a batch must wait until the others are over."""
        return bool(self._paused) and (self.alone or self._waiting[seq] or self._apart in self._paused)

    def _await_result(self, seq: int, receive: Callable[[], Result]) -> None:
        while seq not in self._results:
            if self._broken is not None:
                raise self._broken
            if self._receiving:
                self._changed.wait()
            else:
                self._receive(receive)

    def _receive(self, receive: Callable[[], Result]) -> None:
        """Receives one result with the lock released, for whichever batch it is."""
        self._receiving = True
        self._changed.release()
        try:
            try:
                result = receive()
            finally:
                self._changed.acquire()
            ticket = result.ticket
            if self._paused.get(ticket.seq) != ticket:
                awaited = ", ".join(map(str, self._paused.values()))
                raise RuntimeError(f"pipeline out of step: the result of {ticket} came, awaited: {awaited}")
            self._results[ticket.seq] = result
        except BaseException as error:
            self._broken = self._broken or error
            raise
        finally:
            self._receiving = False
            self._changed.notify_all()
