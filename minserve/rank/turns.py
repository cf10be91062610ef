"""Whose turn it is where several batches are under way on a rank: one of them at a time runs the handler's code.

A batch starts in the order of seq, pauses when it waits for the later stages of its pipeline, and goes on when its result
has come, perhaps several times. So handlers need no locks.

Ranks that share a stage issue collectives in it, so all must take the same moves in the same order. The first of them
decides and tells the others; a rule that each followed by itself would hang on whose frame or result came first.

Only the thread that can go on is woken, and none if the one that gives its turn up can do what is next: beside a stage of a
few milliseconds, whose memory pushes all else out of the caches, a thread's wake-up is no small matter.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, cast

from minserve.rank.order import Move, Order, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    from minserve.rank.order import R, Result


class Turns:
    """Hands out the turns. Every method may be called from any thread.

    Args:
        tell: passes each move on to the ranks that follow this one; None: there are none.
        follows: the moves come from another rank, through `hear`.
    """

    def __init__(self, tell: Callable[[Move], None] | None = None, *, follows: bool = False) -> None:
        self._tell = tell
        self._order = Order(follows=follows)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)  # threads without a batch
        self._sleepers: dict[int, threading.Condition] = {}  # threads of batches that cannot go on, by seq
        self._hearing = threading.Condition(self._lock)
        self._ending = threading.Condition(self._lock)
        self._reading = False
        self._receiving = False
        self._late = False  # results are received when nobody could go on without
        self._broken: BaseException | None = None
        self._stopping = False
        self._aborted: BaseException | None = None

    # ── a batch ──

    def begin(self, read: Callable[[], None]) -> int:
        """Gives the next batch its turn when it may start: those before it have had theirs, and no failure is unsettled.

        Returns its seq; 0 after `stop`, when none is left.

        Args:
            read: waits for the next batch and announces it, or stops. One thread at a time calls it.

        Raises:
            BaseException: what `read` came to.
        """
        with self._lock:
            while True:
                move = self._order.possible()
                if move is not None and move.starts:
                    self._make(move)
                    return move.seq
                if self._stopping and not self._order.waiting:
                    self._idle.notify()  # it passes on to all
                    return 0
                if self._may_read:
                    self._read(read)
                else:
                    self._idle.wait()

    def announce(self, seq: int, *, apart: bool = False) -> None:
        """A batch is there, and will start.

        Args:
            apart: it is to run while no other batch is under way.
        """
        with self._lock:
            self._order.waiting[seq] = apart
            self._wake(idle=not self._reading)  # whoever reads looks for himself

    def pause(self, ticket: Ticket, receive: Callable[[], R], ready: Callable[[], bool] | None = None) -> R:
        """Gives the turn up, waits for the batch's result, and for its turn to go on with it.

        Args:
            receive: waits for the next result, of whichever batch. One thread at a time calls it.
            ready: whether a result has come; None: nobody can tell. With it results are left where they are while a batch
                has its turn: none could go on with them, and the thread that takes them would take its core as well.

        Raises:
            BaseException: what `receive`, or the rank that decides, came to. Whoever waits gets it.
        """
        seq = ticket.seq
        with self._lock:
            self._late = ready is not None
            self._order.paused[seq] = ticket
            try:
                while ready is not None and not self._receiving and ready():
                    self._receive(receive)
                self._order.holder = 0
                self._await_result(seq, receive)
                self._await_turn(seq)
                return cast("R", self._order.results.pop(seq))  # of one pipeline, so of one kind
            except BaseException:
                while self._order.holder not in (0, seq):
                    self._sleep(seq)
                self._order.holder = seq  # the handler's own clean-up runs now
                raise
            finally:
                del self._order.paused[seq]
                self._wake()

    def keep(self, ticket: Ticket, receive: Callable[[], R]) -> R:
        """The same without giving the turn up."""
        seq = ticket.seq
        with self._lock:
            self._order.paused[seq] = ticket
            try:
                self._await_result(seq, receive)
                return cast("R", self._order.results.pop(seq))  # of one pipeline, so of one kind
            finally:
                del self._order.paused[seq]
                self._wake()

    def end(self, seq: int) -> None:
        """The batch is over. Its thread is to come to `begin`, and is not woken for what can begin."""
        with self._lock:
            self._order.holder = 0
            self._wake(idle=False)

    def fail(self, seq: int) -> None:
        """The batch has failed. None starts, and no later one goes on, before `settle`."""
        with self._lock:
            self._order.holder = 0
            self._order.failed.add(seq)
            self._wake()

    def settle(self, seq: int) -> None:
        """Every rank has left the batch that failed."""
        with self._lock:
            self._order.failed.discard(seq)
            self._wake()

    def set_alone(self, alone: bool) -> None:
        """Whether no batch starts while another one is under way. Told by the one whose turn it is."""
        self._order.alone = alone

    # ── the rank ──

    def stop(self) -> None:
        """No further batch comes."""
        with self._lock:
            self._stopping = True
            self._idle.notify_all()
            self._wake()

    def abort(self, error: BaseException) -> None:
        """The rank ends at once: the error is raised where the end is waited for."""
        with self._lock:
            self._aborted = self._aborted or error
            self._wake()

    def wait_for_end(self) -> None:
        """Waits until it was stopped and no batch is under way.

        Raises:
            BaseException: what it was aborted with.
        """
        with self._lock:
            self._ending.wait_for(lambda: self._over)
        if self._aborted is not None:
            raise self._aborted

    def wait_for_move(self) -> bool:
        """Waits until the rank that decides has a move to tell; False if the end has come."""
        with self._lock:
            self._hearing.wait_for(lambda: self._order.due or self._over)
            return self._order.due

    def hear(self, move: Move) -> None:
        """The next move, from the rank that decides."""
        with self._lock:
            self._order.heard = move
            self._wake()

    def give_up(self, error: BaseException) -> None:
        """Nobody can go on any more: the error is raised wherever a result is waited for."""
        with self._lock:
            self._broken = self._broken or error
            self._wake()

    # ── inside, with the lock ──

    @property
    def _over(self) -> bool:
        return self._aborted is not None or (self._stopping and not self._order.under_way)

    @property
    def _may_read(self) -> bool:
        """Whether a thread without a batch may read: while a batch has its turn none of those that come could start."""
        return not (self._reading or self._stopping or self._order.holder)

    def _make(self, move: Move) -> None:
        self._order.make(move)
        if self._tell is not None:
            try:
                self._tell(move)
            except Exception as error:  # a rank of this stage is gone; the server knows, and is about to end this one
                self._broken = self._broken or error

    def _await_turn(self, seq: int) -> None:
        while self._order.next() != Move(seq, False):
            if self._broken is not None:
                raise self._broken
            self._sleep(seq)
        self._make(Move(seq, False))

    def _await_result(self, seq: int, receive: Callable[[], Result]) -> None:
        while seq not in self._order.results:
            if self._broken is not None:
                raise self._broken
            if self._may_receive(seq):
                self._receive(receive)
            else:
                self._sleep(seq)

    def _may_receive(self, seq: int) -> bool:
        """Whether this batch's thread may receive: nobody does, and with `ready` only if nobody could go on otherwise."""
        wanted = not self._late or (self._order.holder in (0, seq) and self._order.possible() is None)
        return wanted and not self._receiving

    def _receive(self, receive: Callable[[], Result]) -> None:
        """Receives one result with the lock released, for whichever batch it is. Its caller wakes that one."""
        self._receiving = True
        self._wake()
        self._lock.release()
        try:
            try:
                result = receive()
            finally:
                self._lock.acquire()
            ticket, paused = result.ticket, self._order.paused
            # The batch whose turn it is has sent its part, and may not have come to `pause` yet.
            if paused.get(ticket.seq, ticket if ticket.seq == self._order.holder else None) != ticket:
                awaited = ", ".join(map(str, paused.values()))
                raise RuntimeError(f"pipeline out of step: the result of {ticket} came, awaited: {awaited}")
            self._order.results[ticket.seq] = result
        except BaseException as error:
            self._broken = self._broken or error
            raise
        finally:
            self._receiving = False

    def _read(self, read: Callable[[], None]) -> None:
        """Reads with the lock released."""
        self._reading = True
        self._lock.release()
        try:
            read()
        finally:
            self._lock.acquire()
            self._reading = False

    def _sleep(self, seq: int) -> None:
        """Lets the others go on, and waits to be woken."""
        self._wake()
        self._sleepers[seq] = threading.Condition(self._lock)
        self._sleepers[seq].wait()
        del self._sleepers[seq]

    def _wake(self, *, idle: bool = True) -> None:
        """Wakes who can go on after a change. Who is woken looks for himself; who is awake does so before he sleeps.

        Args:
            idle: also a thread without a batch.
        """
        order, move = self._order, self._order.possible()
        if self._over:
            self._ending.notify_all()
            self._hearing.notify_all()
        elif order.due:
            self._hearing.notify_all()
        if idle and (move.starts if move is not None else self._may_read):
            self._idle.notify()
        sleepers = self._sleepers
        if not sleepers:
            return
        if self._broken is not None:
            chosen = [order.holder] if order.holder else list(sleepers)  # others would only wake each other
        else:
            chosen = [move.seq] if move is not None and not move.starts else []
            if order.holder in order.results:  # in `keep`
                chosen.append(order.holder)
            if not self._receiving:
                receivers = (seq for seq in order.paused if seq not in order.results and seq in sleepers)
                chosen.append(next(filter(self._may_receive, receivers), 0))
        for seq in chosen:
            if seq in sleepers:
                sleepers[seq].notify()
