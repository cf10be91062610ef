from __future__ import annotations

from dataclasses import dataclass

from minserve.rank.order import Move, Order, Ticket


@dataclass
class Result:
    ticket: Ticket


def test_what_the_deciding_rank_has_told_waits_for_the_frame_and_for_the_result() -> None:
    order = Order(follows=True)
    due = [order.due]
    order.waiting[1] = False
    due.append(order.due)
    order.heard = Move(2, True)
    due.append(order.due)
    assert due == [False, True, False]
    assert (order.next(), order.possible()) == (Move(2, True), None)
    order.waiting[2] = False
    assert order.possible() == Move(2, True)
    order.make(Move(2, True))
    assert (order.holder, order.started, order.possible()) == (2, 2, None)

    order.holder, order.paused[2], order.heard = 0, Ticket(2, 1), Move(2, False)
    assert (order.next(), order.possible()) == (Move(2, False), None)
    order.results[2] = Result(Ticket(2, 1))
    assert order.possible() == Move(2, False)


def test_anything_that_has_not_ended_is_under_way() -> None:
    order = Order(follows=False)
    before = order.under_way
    order.failed.add(1)
    assert (before, order.under_way) == (False, True)
