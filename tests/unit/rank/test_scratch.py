from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from minserve.rank.scratch import Owner, Scratch


class Handler(SimpleNamespace):
    """Sets things on itself in front of `run`, and behind it."""

    def __init__(self, **attributes: object) -> None:
        super().__init__(**attributes)
        self.owner = Owner(vars(self))

    def begin(self, seq: int) -> Scratch:
        scratch = Scratch([self.owner])
        self.seq = seq
        self.begun += 1
        if seq == 2:
            self.only_of_two = True
        scratch.put_aside()
        return scratch

    def go_on(self, scratch: Scratch) -> dict[str, Any]:
        scratch.bring_back()
        seen = dict(vars(self))
        self.answered += 1
        self.last_answer = seen["seq"]
        scratch.give_back()
        return seen


def test_each_batch_finds_what_it_has_set_and_counters_go_on() -> None:
    handler = Handler(begun=0, answered=0, model="m")
    first, second = handler.begin(1), handler.begin(2)
    assert handler.seq == 2
    seen = handler.go_on(first)
    assert seen["seq"] == 1
    third = handler.begin(3)
    assert handler.go_on(second)["seq"] == 2
    assert handler.go_on(third)["seq"] == 3
    assert (handler.begun, handler.answered, handler.last_answer, handler.model) == (3, 3, 3, "m")


def test_what_a_batch_has_first_set_is_gone_from_the_others() -> None:
    handler = Handler(begun=0, answered=0)
    first = Scratch([handler.owner])
    handler.mine = 1
    first.put_aside()
    del handler.mine
    first.bring_back()
    assert handler.mine == 1
    first.give_back()
    assert not hasattr(handler, "mine")


def test_a_batch_that_pauses_again_keeps_what_it_has_set_in_each_turn() -> None:
    handler = Handler(step=0, seq=0)
    first = Scratch([handler.owner])
    handler.seq = 1
    first.put_aside()
    handler.seq = 2
    first.bring_back()
    handler.step = 1
    first.put_aside()
    assert (handler.seq, handler.step) == (2, 1)
    handler.step = 7
    first.bring_back()
    assert (handler.seq, handler.step) == (1, 1)
    first.give_back()
    assert (handler.seq, handler.step) == (2, 7)


def test_a_batch_finds_again_what_it_has_set_to_the_value_that_was_there() -> None:
    handler = Handler(explain=False)

    def begin(size: int, explain: bool) -> Scratch:
        scratch = Scratch([handler.owner])
        handler.size, handler.explain = size, explain
        scratch.put_aside()
        return scratch

    batches = [(1, False), (1, False), (2, True), (1, True)]
    started = [begin(*batch) for batch in batches]
    for scratch, batch in zip(started, batches, strict=True):
        scratch.bring_back()
        assert (handler.size, handler.explain) == batch
        scratch.give_back()
