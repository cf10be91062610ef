"""Which batch may have its turn next, where several are under way on a rank: the rules, without the threads (turns.py)."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar


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


class Order:
    """What is under way.

    Args:
        follows: another rank decides.

    Attributes:
        alone: no batch starts while another one is under way.
        holder: seq of the batch whose turn it is, 0 for nobody's.
        started: the last batch that has.
        waiting: batches that are to start; the value: apart from all others.
        apart: one that was started so.
        paused: batches that wait for a result.
        results: for those of them that may go on, in the order in which they came.
        failed: batches, until the server knows that every rank has left them.
        heard: what the rank that decides has told.
    """

    def __init__(self, *, follows: bool) -> None:
        self._follows = follows
        self.alone = False
        self.holder = 0
        self.started = 0
        self.waiting: dict[int, bool] = {}
        self.apart = 0
        self.paused: dict[int, Ticket] = {}
        self.results: dict[int, Result] = {}
        self.failed: set[int] = set()
        self.heard: Move | None = None

    @property
    def under_way(self) -> bool:
        """Whether anything is."""
        return bool(self.holder or self.waiting or self.paused or self.failed)

    @property
    def due(self) -> bool:
        """Whether the rank that decides has a move to tell."""
        return self._follows and not self.holder and self.heard is None and bool(self.waiting or self.paused)

    def next(self) -> Move | None:
        """The next move; None while nothing can move. What has been told may have to wait for its frame or its result."""
        if self.holder:
            return None
        if self._follows:
            return self.heard if self.heard is not None and self._may(*self.heard) else None
        if self.results:
            ready = next(iter(self.results))  # before a new batch, for an answer that is all but ready should leave
            if self._may(ready, False):
                return Move(ready, False)
        seq = self.started + 1
        return Move(seq, True) if seq in self.waiting and self._may(seq, True) and not self._holds_back(seq) else None

    def possible(self) -> Move | None:
        """The next move, if all that it needs is here."""
        move = self.next()
        return move if move is not None and move.seq in (self.waiting if move.starts else self.results) else None

    def make(self, move: Move) -> None:
        """Makes the next move."""
        self.holder, self.heard = move.seq, None
        if move.starts:
            self.started = move.seq
            self.apart = move.seq if self.waiting.pop(move.seq) else 0

    def _may(self, seq: int, starts: bool) -> bool:
        return not self.failed or (not starts and seq <= min(self.failed))

    def _holds_back(self, seq: int) -> bool:
        """Whether a batch must wait until the others are over."""
        return bool(self.paused) and (self.alone or self.waiting[seq] or self.apart in self.paused)
