from __future__ import annotations

import functools
import queue
import threading
from dataclasses import dataclass

import pytest

from minserve.rank.turns import Move, Ticket, Turns
from tests.unit.rank.rig import Running


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


def result(seq: int, run: int = 1) -> Result:
    return Result(Ticket(seq, run), f"result {run} of {seq}")


def started(turns: Turns, *seqs: int) -> None:
    """These batches are under way; the last one has its turn, the others pause for results that come later."""
    for seq in seqs:
        turns.announce(seq)
        turns.start(seq)


def paused(turns: Turns, line: Line, *seqs: int) -> list[Running[Result]]:
    """These batches are under way, and pause."""
    calls = []
    for seq in seqs:
        started(turns, seq)
        calls.append(Running(turns.pause, Ticket(seq, 1), line.receive))
        with turns._changed:
            turns._changed.wait_for(functools.partial(turns._paused.__contains__, seq))
    return calls


def test_batches_start_in_their_order_whichever_thread_is_first() -> None:
    turns = Turns()
    turns.announce(1)
    turns.announce(2)
    second = Running(turns.start, 2)
    assert turns._next() == Move(1, True)
    turns.start(1)
    assert turns._next() is None, "one at a time"
    turns.end(1)
    second.result()


def test_while_a_batch_waits_for_its_result_the_next_one_starts_and_each_goes_on_with_its_own() -> None:
    turns, line = Turns(), Line()
    first, second = paused(turns, line, 1, 2)
    started(turns, 3)
    line.give(result(1), result(2))
    turns.end(3)
    assert first.result().text == "result 1 of 1"
    assert turns._next() is None, "the second waits for its turn"
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
    with turns._changed:
        turns._changed.wait_for(lambda: 1 in turns._results)
    turns.announce(3)
    turns.end(2)
    first.result()
    assert turns._next() is None
    turns.end(1)
    assert turns._next() == Move(3, True)


def test_a_further_run_of_a_batch_is_served_by_whoever_receives_it() -> None:
    turns, line = Turns(), Line()
    first, second = paused(turns, line, 1, 2)
    line.give(result(1))
    first.result()
    again = Running(turns.pause, Ticket(1, 2), line.receive)
    with turns._changed:
        turns._changed.wait_for(lambda: turns._paused.get(1) == Ticket(1, 2))
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
        turns.end(turns._holder)
    assert errors == [1, 2]


@pytest.mark.parametrize("rule", ["alone", "apart", "apart before"])
def test_a_batch_that_is_to_be_alone_waits_for_the_others_and_they_for_it(rule: str) -> None:
    turns, line = Turns(), Line()
    turns.alone = rule == "alone"
    turns.announce(1, apart=rule == "apart before")
    turns.start(1)
    first = Running(turns.pause, Ticket(1, 1), line.receive)
    with turns._changed:
        turns._changed.wait_for(lambda: 1 in turns._paused)
    turns.announce(2, apart=rule == "apart")
    assert turns._next() is None
    line.give(result(1))
    first.result()
    turns.end(1)
    assert turns._next() == Move(2, True)


def test_after_a_failure_earlier_batches_go_on_and_later_ones_wait_until_it_is_settled() -> None:
    turns, line = Turns(), Line()
    first, second = paused(turns, line, 1, 2)
    line.give(result(1))
    first.result()
    turns.end(1, failed=True)
    turns.announce(3)
    line.give(result(2))
    with turns._changed:
        turns._changed.wait_for(lambda: 2 in turns._results)
    assert turns._next() is None
    turns.settle(1)
    second.result()
    turns.end(2)

    turns, line = Turns(), Line()
    (first,) = paused(turns, line, 1)
    started(turns, 2)
    turns.end(2, failed=True)
    turns.announce(3)
    assert turns._next() is None
    line.give(result(1))
    first.result()
    turns.end(1)
    assert turns._next() is None
    turns.settle(2)
    assert turns._next() == Move(3, True)


def test_a_batch_may_wait_for_its_result_and_keep_its_turn() -> None:
    turns, line = Turns(), Line()
    (first,) = paused(turns, line, 1)
    started(turns, 2)
    turns.announce(3)
    kept = Running(turns.keep, Ticket(2, 1), line.receive)
    line.give(result(1), result(2))
    assert kept.result().text == "result 1 of 2"
    assert turns._next() is None
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

    follows.announce(1)
    follows.announce(2)
    mine = [Running(follows.start, 1), Running(follows.start, 2)]
    assert follows._next() is None, "nothing has been told"
    assert follows.wait_for_move()
    follows.hear(told[0])
    mine[0].result()
    going_on = Running(follows.pause, Ticket(1, 1), other_line.receive)
    other_line.give(result(1))  # early: the first rank has moved otherwise
    with follows._changed:
        follows._changed.wait_for(lambda: 1 in follows._results)
    assert follows.wait_for_move()
    follows.hear(told[1])
    mine[1].result()
    follows.end(2)
    assert follows.wait_for_move()
    follows.hear(told[2])
    going_on.result()
    follows.end(1)
    follows.stop()
    assert not follows.wait_for_move()


def test_a_follower_that_hears_no_more_fails_what_waits_for_a_result() -> None:
    turns, line = Turns(follows=True), Line()
    turns.announce(1)
    turns.hear(Move(1, True))
    turns.start(1)
    first = Running(turns.pause, Ticket(1, 1), line.receive)
    line.give(result(1))
    turns.fail(ConnectionError("the first rank is gone"))
    with pytest.raises(ConnectionError):
        first.result()


def test_the_end_waits_for_all_that_is_under_way_unless_the_rank_ends_at_once() -> None:
    turns, line = Turns(), Line()
    (first,) = paused(turns, line, 1)
    end = Running(turns.wait_for_end)
    turns.stop()
    line.give(result(1))
    first.result()
    turns.end(1, failed=True)
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
        self.reading = threading.Lock()
        self.threads = [Running(self.work) for _ in range(4)]

    def work(self) -> None:
        while True:
            with self.reading:
                seq = next(self.seqs, 0)
                if not seq:
                    return
                self.turns.announce(seq)
            self.turns.start(seq)
            self.log.append(f"{seq} starts")
            if seq % 5:
                self.answer(seq)
                self.turns.pause(Ticket(seq, 1), self.line.receive)
                self.log.append(f"{seq} goes on")
            self.turns.end(seq, failed=not seq % 5)
            if not seq % 5:
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
