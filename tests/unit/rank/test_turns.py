from __future__ import annotations

import functools
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from minserve.rank.order import Move, Ticket
from minserve.rank.turns import Turns
from tests.unit.rank.rig import DEADLINE_S, Running


@dataclass
class Result:
    ticket: Ticket
    text: str = ""


class Line:
    """Where results come from."""

    def __init__(self) -> None:
        self._results: queue.SimpleQueue[Result | Exception] = queue.SimpleQueue()

    def give(self, *results: Result | Exception) -> None:
        for result in results:
            self._results.put(result)

    def receive(self) -> Result:
        result = self._results.get()
        if isinstance(result, Exception):
            raise result
        return result

    def ready(self) -> bool:
        return not self._results.empty()


def result(seq: int, run: int = 1) -> Result:
    return Result(Ticket(seq, run), f"result {run} of {seq}")


def reached(turns: Turns, arrived: Callable[[], bool]) -> None:
    """Waits until the other threads have come so far."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        with turns._lock:
            if arrived():
                return
        assert time.monotonic() < deadline, "it is not reached"
        time.sleep(0)  # lets them


def no_more() -> None:
    """In place of reading a batch: there is one already, or none may start."""
    raise AssertionError("it reads")


def started(turns: Turns, *seqs: int) -> None:
    """These batches have started, one after the other."""
    for seq in seqs:
        turns.announce(seq)
        assert turns.begin(no_more) == seq


def paused(turns: Turns, line: Line, *seqs: int) -> list[Running[Result]]:
    """These batches are under way, and pause."""
    calls = []
    for seq in seqs:
        started(turns, seq)
        calls.append(Running(turns.pause, Ticket(seq, 1), line.receive))
        reached(turns, functools.partial(turns._order.paused.__contains__, seq))
    return calls


def test_batches_start_in_their_order_one_at_a_time() -> None:
    turns = Turns()
    turns.announce(1)
    turns.announce(2)
    assert turns.begin(no_more) == 1
    assert turns._order.next() is None
    turns.end(1)
    assert turns.begin(no_more) == 2


def test_nobody_reads_while_a_batch_has_its_turn_and_one_thread_does_when_it_pauses() -> None:
    turns, line, frames = Turns(), Line(), queue.SimpleQueue[int]()
    started(turns, 1)
    idle = [Running(turns.begin, lambda: turns.announce(frames.get())) for _ in "ab"]
    reached(turns, lambda: len(turns._idle._waiters) == 2)  # type: ignore[attr-defined]
    assert not turns._reading
    first = Running(turns.pause, Ticket(1, 1), line.receive)
    reached(turns, lambda: turns._reading)
    frames.put(2)
    reached(turns, lambda: turns._order.holder == 2)
    line.give(result(1))
    reached(turns, lambda: 1 in turns._order.results)
    turns.end(2)
    first.result()
    turns.end(1)
    turns.announce(3)
    turns.stop()
    begun = sorted(call.result() for call in idle)
    assert begun == [2, 3]
    turns.end(3)
    assert turns.begin(no_more) == 0


def test_results_are_left_where_they_are_while_a_batch_has_its_turn_if_it_can_be_told_that_they_came() -> None:
    turns, line = Turns(), Line()
    pause = functools.partial(turns.pause, receive=line.receive, ready=line.ready)
    started(turns, 1)
    turns.announce(2)
    first = Running(pause, Ticket(1, 1))
    reached(turns, lambda: 1 in turns._order.paused)
    assert turns.begin(no_more) == 2
    line.give(result(1))
    assert not turns._receiving
    assert not turns._order.results
    turns.announce(3)
    second = Running(pause, Ticket(2, 1))
    assert first.result().ticket.seq == 1, "and before the next one starts"
    turns.end(1)
    assert turns.begin(no_more) == 3
    turns.end(3)
    line.give(result(2))
    assert second.result().ticket.seq == 2


def test_a_batch_that_keeps_its_turn_is_not_kept_waiting_by_those_that_pause() -> None:
    turns, line = Turns(), Line()
    started(turns, 1)
    first = Running(functools.partial(turns.pause, receive=line.receive, ready=line.ready), Ticket(1, 1))
    reached(turns, lambda: turns._receiving)
    started(turns, 2)
    second = Running(turns.keep, Ticket(2, 1), line.receive)
    reached(turns, lambda: 2 in turns._order.paused)
    line.give(result(1), result(2))
    assert second.result().ticket.seq == 2
    turns.end(2)
    assert first.result().ticket.seq == 1


def test_while_a_batch_waits_for_its_result_the_next_one_starts_and_each_goes_on_with_its_own() -> None:
    turns, line = Turns(), Line()
    first, second = paused(turns, line, 1, 2)
    started(turns, 3)
    line.give(result(1), result(2))
    turns.end(3)
    assert first.result().text == "result 1 of 1"
    assert turns._order.next() is None, "the second waits for its turn"
    turns.end(1)
    assert second.result().text == "result 1 of 2"
    turns.end(2)
    turns.stop()
    turns.wait_for_end()


def test_a_batch_whose_result_is_here_goes_before_one_that_could_start() -> None:
    turns, line = Turns(), Line()
    (first,) = paused(turns, line, 1)
    started(turns, 2)
    line.give(result(1))
    reached(turns, lambda: 1 in turns._order.results)
    turns.announce(3)
    turns.end(2)
    first.result()
    assert turns._order.next() is None
    turns.end(1)
    assert turns._order.next() == Move(3, True)


def test_a_further_run_of_a_batch_is_served_by_whoever_receives_it() -> None:
    turns, line = Turns(), Line()
    first, second = paused(turns, line, 1, 2)
    line.give(result(1))
    first.result()
    again = Running(turns.pause, Ticket(1, 2), line.receive)
    reached(turns, lambda: turns._order.paused.get(1) == Ticket(1, 2))
    line.give(result(1, run=2))  # the second batch's thread is at the line now
    assert again.result().text == "result 2 of 1"
    turns.end(1)
    line.give(result(2))
    assert second.result().text == "result 1 of 2"


@pytest.mark.parametrize("wrong", [result(2), result(1, run=2)])
def test_a_result_that_nobody_waits_for_breaks_all_who_wait(wrong: Result) -> None:
    turns, line = Turns(), Line()
    (first,) = paused(turns, line, 1)
    line.give(wrong)
    with pytest.raises(
        RuntimeError, match=r"out of step: the result of run . of batch . came, awaited: run 1 of batch 1"
    ):
        first.result()


def test_a_broken_line_is_heard_of_by_all_who_wait_one_after_the_other() -> None:
    turns, line = Turns(), Line()
    first, second = paused(turns, line, 1, 2)
    line.give(ConnectionError("gone"))
    errors = []
    for seq, call in ((1, first), (2, second)):
        with pytest.raises(ConnectionError):
            call.result()
        errors.append(seq)
        turns.end(turns._order.holder)
    assert errors == [1, 2]


def test_a_result_may_be_there_before_its_batch_has_come_to_wait_for_it() -> None:
    turns, line = Turns(), Line()
    first, second = paused(turns, line, 1, 2)
    line.give(result(1))
    first.result()
    line.give(result(1, run=2))  # the second batch's thread is at the line
    reached(turns, lambda: 1 in turns._order.results or turns._broken is not None)
    assert turns.pause(Ticket(1, 2), line.receive).ticket == Ticket(1, 2)
    turns.end(1)
    line.give(result(2))
    second.result()


def test_those_who_heard_of_a_broken_line_wait_for_their_turn_without_waking_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns, line, slept = Turns(), Line(), list[int]()
    sleep = turns._sleep

    def counted(seq: int) -> None:
        slept.append(seq)
        sleep(seq)

    calls = paused(turns, line, 1, 2)
    started(turns, 3)
    monkeypatch.setattr(turns, "_sleep", counted)
    line.give(ConnectionError("rank 1 is gone"))
    reached(turns, lambda: bool(slept))
    for _ in range(100):
        with turns._lock:
            turns._wake()
        time.sleep(0)  # lets them
    assert len(slept) < 5
    turns.end(3)
    for _ in calls:
        reached(turns, lambda: turns._order.holder != 0)
        turns.end(turns._order.holder)
    for call in calls:
        with pytest.raises(ConnectionError):
            call.result()


@pytest.mark.parametrize("rule", ["alone", "apart", "apart before"])
def test_a_batch_that_is_to_be_alone_waits_for_the_others_and_they_for_it(rule: str) -> None:
    turns, line = Turns(), Line()
    turns.set_alone(rule == "alone")
    turns.announce(1, apart=rule == "apart before")
    assert turns.begin(no_more) == 1
    first = Running(turns.pause, Ticket(1, 1), line.receive)
    reached(turns, lambda: 1 in turns._order.paused)
    turns.announce(2, apart=rule == "apart")
    assert turns._order.next() is None
    line.give(result(1))
    first.result()
    turns.end(1)
    assert turns._order.next() == Move(2, True)


def test_after_a_failure_earlier_batches_go_on_and_later_ones_wait_until_it_is_settled() -> None:
    turns, line = Turns(), Line()
    first, second = paused(turns, line, 1, 2)
    line.give(result(1))
    first.result()
    turns.fail(1)
    turns.announce(3)
    line.give(result(2))
    reached(turns, lambda: 2 in turns._order.results)
    assert turns._order.next() is None
    turns.settle(1)
    second.result()
    turns.end(2)

    turns, line = Turns(), Line()
    (first,) = paused(turns, line, 1)
    started(turns, 2)
    turns.fail(2)
    turns.announce(3)
    assert turns._order.next() is None
    line.give(result(1))
    first.result()
    turns.end(1)
    assert turns._order.next() is None
    turns.settle(2)
    assert turns._order.next() == Move(3, True)


def test_a_batch_may_wait_for_its_result_and_keep_its_turn() -> None:
    turns, line = Turns(), Line()
    (first,) = paused(turns, line, 1)
    started(turns, 2)
    turns.announce(3)
    kept = Running(turns.keep, Ticket(2, 1), line.receive)
    line.give(result(1), result(2))
    assert kept.result().text == "result 1 of 2"
    assert turns._order.next() is None
    turns.end(2)
    first.result()


def test_ranks_that_follow_take_the_moves_that_the_first_one_tells() -> None:
    told: list[Move] = []
    leads, follows = Turns(told.append), Turns(follows=True)
    line, other_line = Line(), Line()
    (first,) = paused(leads, line, 1)
    started(leads, 2)
    line.give(result(1))
    leads.end(2)
    first.result()
    assert told == [Move(1, True), Move(2, True), Move(1, False)]

    frames = queue.SimpleQueue[int]()

    def read() -> None:
        seq = frames.get(timeout=DEADLINE_S)
        follows.announce(seq) if seq else follows.stop()

    mine = [Running(follows.begin, read) for _ in "abc"]  # one of them reads on
    frames.put(1)
    frames.put(2)
    reached(follows, lambda: 2 in follows._order.waiting)
    assert follows._order.next() is None, "nothing has been told"
    assert follows.wait_for_move()
    follows.hear(told[0])
    reached(follows, lambda: follows._order.holder == 1)
    going_on = Running(follows.pause, Ticket(1, 1), other_line.receive)
    other_line.give(result(1))  # early: the first rank has moved otherwise
    reached(follows, lambda: 1 in follows._order.results)
    assert follows.wait_for_move()
    follows.hear(told[1])
    reached(follows, lambda: follows._order.holder == 2)
    follows.end(2)
    assert follows.wait_for_move()
    follows.hear(told[2])
    going_on.result()
    follows.end(1)
    frames.put(0)
    assert not follows.wait_for_move()
    assert sorted(call.result() for call in mine) == [0, 1, 2]


def test_a_follower_that_hears_no_more_fails_what_waits_for_a_result() -> None:
    turns, line = Turns(follows=True), Line()
    turns.announce(1)
    turns.hear(Move(1, True))
    assert turns.begin(no_more) == 1
    first = Running(turns.pause, Ticket(1, 1), line.receive)
    line.give(result(1))
    turns.give_up(ConnectionError("the first rank is gone"))
    with pytest.raises(ConnectionError):
        first.result()


def test_the_end_waits_for_all_that_is_under_way_unless_the_rank_ends_at_once() -> None:
    turns, line = Turns(), Line()
    (first,) = paused(turns, line, 1)
    end = Running(turns.wait_for_end)
    turns.stop()
    line.give(result(1))
    first.result()
    turns.fail(1)
    turns.settle(1)
    end.result()

    turns = Turns()
    started(turns, 1)
    end = Running(turns.wait_for_end)
    turns.abort(SystemExit(3))
    with pytest.raises(SystemExit):
        end.result()


class StageRank:
    """One of two ranks of a first stage: a few threads that carry batches through, and a log of the turns they had.

    Its later stages answer in order, a few batches behind; every fifth batch fails in its first turn.
    """

    def __init__(self, turns: Turns, behind: int, batches: int) -> None:
        self.turns, self.behind, self.batches = turns, behind, batches
        self.line = Line()
        self.log: list[str] = []
        self.seqs = iter(range(1, batches + 1))
        self.sent: list[int] = []
        self.threads = [Running(self.work) for _ in range(4)]

    def read(self) -> None:
        seq = next(self.seqs, 0)
        self.turns.announce(seq) if seq else self.turns.stop()

    def work(self) -> None:
        while seq := self.turns.begin(self.read):
            self.log.append(f"{seq} starts")
            if seq % 5:
                self.answer(seq)
                self.turns.pause(Ticket(seq, 1), self.line.receive)
                self.log.append(f"{seq} goes on")
                self.turns.end(seq)
            else:
                self.turns.fail(seq)
                self.turns.settle(seq)

    def answer(self, seq: int) -> None:
        """The later stages have this one now, and are through with an earlier one. The last few come at once."""
        self.sent.append(seq)
        while len(self.sent) > self.behind or (self.sent and seq >= self.batches - 4):
            self.line.give(result(self.sent.pop(0)))


@pytest.mark.parametrize(("one", "two"), [(0, 0), (2, 0), (2, 1), (2, 2)])
def test_two_ranks_of_a_stage_take_the_same_turns_however_their_results_come(one: int, two: int) -> None:
    follows = Turns(follows=True)
    told: queue.SimpleQueue[Move] = queue.SimpleQueue()
    leader, follower = StageRank(Turns(told.put), one, 60), StageRank(follows, two, 60)

    def follow() -> None:
        while follows.wait_for_move():
            follows.hear(told.get())

    hearing = Running(follow)
    for thread in leader.threads + follower.threads:
        thread.result()
    follows.stop()
    hearing.result()
    assert follower.log == leader.log
    assert len(leader.log) == 60 + 48
