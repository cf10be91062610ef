"""What has come from the server, for whoever in this rank waits for it: the loop for batches, a stream for its grant.

A handler may send from a thread of its own, so several threads can wait at once. One of them reads the socket, takes what it
reads for all of them, and the others wait until it has. What belongs to a later batch is parked for it.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from minserve.rank.connection import Disconnected
from minserve.wire.frames import Kind
from minserve.wire.messages import Step, unpack

if TYPE_CHECKING:
    from collections.abc import Callable

    from minserve.rank.connection import Connection
    from minserve.wire.frames import Frame

_FOR_THE_LOOP = frozenset({Kind.LOAD, Kind.BATCH, Kind.SHUTDOWN})


class Inbox:
    """The frames of one connection, sorted.

    Attributes:
        broken: what has ended the link, for every thread that waits or will; None while it is whole.
        stopping: SHUTDOWN has come.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.broken: BaseException | None = None
        self.stopping = False
        self._changed = threading.Condition()
        self._reading = False  # one thread is in `receive`
        self._waiting = 0  # how many threads wait for it
        self._notes = False  # something is, or was, in what follows the parked frames here
        self._parked: deque[Frame] = deque()
        self._finished = 0
        # By seq: how far a stream may go, which streams are cancelled, which batches may be left after an exception.
        self._grants: dict[int, int] = {}
        self._cancelled: set[int] = set()
        self._continued: set[int] = set()

    def next(self) -> Frame:
        """The next LOAD, BATCH or SHUTDOWN, in the order in which they were sent.

        Raises:
            Disconnected: the server has closed the link.
            WireError: it has sent what is no frame.
        """
        if not self._parked:  # it often is there already, and the loop is the only one that takes it
            self._wait(self._parked.__len__)
        return self._parked.popleft()

    def wait_for_grant(self, seq: int, step: int) -> bool:
        """Waits until the stream of a batch may take a step; False if it is cancelled, or this rank ends, before it.

        A thread that its batch has left behind is let go: nobody will grant it anything any more.
        """
        self._notes = True  # before anything is looked at, see `finished`

        def may() -> bool:
            return self._grants.get(seq, 0) >= step or seq <= self._finished

        self._wait(lambda: may() or seq in self._cancelled or self.stopping)
        return may()

    def granted(self, seq: int) -> int:
        """The step up to which a batch's stream may go by the grants that have been read; 0 if none was."""
        return self._grants.get(seq, 0)

    def wait_for_continue(self, seq: int) -> None:
        """Waits until the server knows that every rank has left a batch.

        Raises:
            Disconnected: it never will; the worker ends.
        """
        self._wait(lambda: seq in self._continued or self.stopping)
        if seq not in self._continued:
            raise Disconnected

    def cancelled(self, seq: int) -> bool:
        """Whether the stream of a batch has been cancelled."""
        return seq in self._cancelled

    def finished(self, seq: int) -> None:
        """Nothing about this batch or an earlier one is wanted any more."""
        self._finished = seq
        if not self._notes:  # nobody has ever waited for a grant, and nothing was noted: the rule, and worth no lock
            return
        with self._changed:
            self._grants = {key: step for key, step in self._grants.items() if key > seq}
            self._cancelled = {key for key in self._cancelled if key > seq}
            self._continued = {key for key in self._continued if key > seq}
            self._changed.notify_all()

    def _wait(self, arrived: Callable[[], bool | int]) -> None:
        with self._changed:
            while not arrived():
                if self.broken is not None:
                    raise self.broken
                if self._reading:
                    self._waiting += 1
                    self._changed.wait()
                    self._waiting -= 1
                else:
                    self._read()

    def _read(self) -> None:
        """Reads what has come with the lock released, so that others may come to wait or find theirs already there."""
        self._reading = True
        self._changed.release()
        try:
            try:
                frames = self._connection.receive_all()
            finally:
                self._changed.acquire()
            for frame in frames:
                self._take(frame)
        except BaseException as error:  # whatever it was, a part of a frame may be lost
            self.broken = error
            raise
        finally:
            self._reading = False
            if self._waiting:
                self._changed.notify_all()

    def _take(self, frame: Frame) -> None:
        if frame.kind in _FOR_THE_LOOP:
            self._parked.append(frame)
            self.stopping = self.stopping or frame.kind is Kind.SHUTDOWN
            return
        self._notes = True
        if frame.kind is Kind.GRANT:
            step = unpack(Step, frame.meta).step
            # Behind a CANCEL it counts for nothing: a rank that had read both would pass the step where the others leave.
            if frame.seq not in self._cancelled:
                self._grants[frame.seq] = step
        elif frame.kind is Kind.CANCEL:
            self._cancelled.add(frame.seq)
        elif frame.kind is Kind.CONTINUE:
            self._continued.add(frame.seq)
        # DRAIN asks nothing of a rank that has nothing queued.
