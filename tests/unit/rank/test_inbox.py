from __future__ import annotations

import threading

import pytest

from minserve.errors import WireError
from minserve.rank.connection import Disconnected
from minserve.rank.inbox import Inbox
from minserve.wire.frames import Frame, Kind
from tests.unit.rank.rig import (
    DEADLINE_S,
    SHUTDOWN,
    FakeConnection,
    PacedConnection,
    Running,
    batch,
    cancel,
    grant,
    load,
    resume,
)

BAD_GRANT = Frame(Kind.GRANT, 0, 1, bytearray(b"\xc1"), bytearray())


class Watched(threading.Condition):
    """Tells when a thread waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.set()  # under the lock: nobody can change anything before it really waits
        return super().wait(timeout)


class Threads:
    """An inbox that several threads wait at."""

    def __init__(self) -> None:
        self.connection = PacedConnection()
        self.inbox = Inbox(self.connection)
        self.inbox._changed = self.changed = Watched()

    def reader(self, seq: int, step: int) -> Running[bool]:
        """A thread that waits for a grant, and reads for all the others."""
        thread = Running(self.inbox.wait_for_grant, seq, step)
        assert self.connection.read.wait(DEADLINE_S)
        return thread

    def waiter(self, seq: int, step: int) -> Running[bool]:
        """A second one."""
        thread = Running(self.inbox.wait_for_grant, seq, step)
        assert self.changed.waits.wait(DEADLINE_S)
        return thread


# ── one thread ──


def test_what_the_loop_works_on_comes_in_the_order_in_which_it_was_sent() -> None:
    frames = [load("/m"), batch(1), grant(1, 9), resume(1), batch(2), cancel(1, 9), SHUTDOWN]
    inbox = Inbox(FakeConnection(frames))
    assert [inbox.next().kind for _ in range(4)] == [Kind.LOAD, Kind.BATCH, Kind.BATCH, Kind.SHUTDOWN]
    with pytest.raises(Disconnected):
        inbox.next()


def test_batches_met_by_a_stream_are_parked_in_order() -> None:
    connection = FakeConnection([batch(2), grant(1, 9), batch(3)])
    inbox = Inbox(connection)
    assert inbox.wait_for_grant(1, 9)
    assert connection.log == ["<BATCH 2", "<GRANT 1"]  # and no further: what has not come may not be waited for
    assert [inbox.next().seq, inbox.next().seq] == [2, 3]


def test_a_grant_that_comes_before_it_is_wanted_is_kept() -> None:
    inbox = Inbox(FakeConnection([grant(1, 9), batch(1)]))
    assert inbox.next().seq == 1
    assert inbox.wait_for_grant(1, 9)
    with pytest.raises(Disconnected):
        inbox.wait_for_grant(1, 10)


def test_grants_are_each_batchs_own() -> None:
    inbox = Inbox(FakeConnection([grant(2, 20), grant(1, 5)]))
    assert inbox.wait_for_grant(1, 5)
    assert inbox.wait_for_grant(2, 20)


def test_a_cancelled_stream_goes_to_the_last_granted_step_and_no_further() -> None:
    inbox = Inbox(FakeConnection([grant(1, 4), cancel(1, 4)]))
    assert [inbox.wait_for_grant(1, step) for step in (3, 4, 5, 4)] == [True, True, False, True]
    assert inbox.cancelled(1)
    assert not inbox.cancelled(2)


def test_a_grant_behind_a_cancel_counts_for_nothing() -> None:
    """A refused chunk makes the server grant without end; a rank that had left at the cancel would leave alone."""
    inbox = Inbox(FakeConnection([cancel(1, 4), grant(1, 2**62), batch(2)]))
    assert inbox.next().seq == 2
    assert not inbox.wait_for_grant(1, 5)


def test_a_grant_without_end_is_one_like_any_other() -> None:
    inbox = Inbox(FakeConnection([grant(1, 4), grant(1, 2**62)]))
    assert inbox.wait_for_grant(1, 2**40)


def test_continue_is_for_the_batch_it_names() -> None:
    connection = FakeConnection([resume(1), resume(3), cancel(2, 8), batch(3), resume(2)])
    inbox = Inbox(connection)
    inbox.wait_for_continue(2)
    assert not connection.incoming
    assert inbox.cancelled(2)


def test_shutdown_ends_every_wait_and_is_still_there_for_the_loop() -> None:
    inbox = Inbox(FakeConnection([batch(2), SHUTDOWN]))
    assert not inbox.wait_for_grant(1, 1)
    assert inbox.stopping
    with pytest.raises(Disconnected):
        inbox.wait_for_continue(1)
    assert [inbox.next().kind, inbox.next().kind] == [Kind.BATCH, Kind.SHUTDOWN]


def test_nothing_is_kept_of_a_batch_that_is_over() -> None:
    inbox = Inbox(
        FakeConnection([grant(1, 9), cancel(2, 8), resume(1), grant(3, 5), cancel(3, 5), resume(3), batch(4)])
    )
    inbox.next()
    inbox.finished(2)
    assert not inbox.cancelled(2)
    assert (inbox._grants, inbox._cancelled, inbox._continued) == ({3: 5}, {3}, {3})


@pytest.mark.parametrize("error", [Disconnected(), WireError("not a minserve frame")])
def test_what_ended_the_link_is_told_to_whoever_waits_later(error: Exception) -> None:
    connection = PacedConnection()
    connection.give(batch(1), error)
    inbox = Inbox(connection)
    for wait in (lambda: inbox.wait_for_grant(1, 1), lambda: inbox.wait_for_continue(1)):
        with pytest.raises(type(error)):
            wait()
    assert inbox.broken is error
    assert inbox.next().seq == 1  # it came before
    with pytest.raises(type(error)):
        inbox.next()


def test_a_grant_that_is_none_ends_the_link() -> None:
    inbox = Inbox(FakeConnection([BAD_GRANT, batch(1)]))
    for _ in range(2):
        with pytest.raises(WireError, match="bad Step message"):
            inbox.next()


# ── several threads ──


def test_one_thread_reads_for_all() -> None:
    it = Threads()
    first = it.reader(1, 5)
    second = it.waiter(2, 5)
    it.connection.give(grant(2, 5))
    assert second.result()
    it.connection.give(batch(3), grant(1, 5))
    assert first.result()
    assert it.inbox.next().seq == 3


def test_when_the_reader_has_what_it_wants_another_reads_on() -> None:
    it = Threads()
    first = it.reader(1, 5)
    second = it.waiter(2, 5)
    it.connection.give(grant(1, 5))
    assert first.result()
    it.connection.give(grant(2, 4), grant(2, 5))
    assert second.result()


def test_a_cancel_reaches_all_who_wait() -> None:
    it = Threads()
    waits = [it.reader(1, 5), it.waiter(1, 6)]
    it.connection.give(cancel(1, 4))
    assert [wait.result() for wait in waits] == [False, False]


@pytest.mark.parametrize("error", [Disconnected(), WireError("not a minserve frame")])
def test_a_reader_that_dies_leaves_nobody_waiting(error: Exception) -> None:
    it = Threads()
    waits = [it.reader(1, 5), it.waiter(2, 5)]
    it.connection.give(error)
    for wait in waits:
        with pytest.raises(type(error)):
            wait.result()


def test_a_reader_that_dies_of_a_bad_grant_leaves_nobody_waiting() -> None:
    it = Threads()
    waits = [it.reader(1, 5), it.waiter(2, 5)]
    it.connection.give(BAD_GRANT)
    for wait in waits:
        with pytest.raises(WireError, match="bad Step message"):
            wait.result()


def test_a_thread_that_its_batch_has_left_behind_is_let_go() -> None:
    it = Threads()
    reader, waiter = it.reader(1, 5), it.waiter(1, 5)
    it.inbox.finished(1)
    assert waiter.result()
    it.connection.give(batch(2))  # what the reader is in ends with the next frame
    assert reader.result()
    assert it.inbox.next().seq == 2
    assert it.inbox.wait_for_grant(1, 6)  # nor does it wait if it comes later
