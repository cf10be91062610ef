"""Micro-batching: the pieces of a batch, their order, their failures, their threads."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest

from minserve.compat.ts.handler_utils.micro_batching import HANDLER_METHODS, MicroBatching
from minserve.rank.streaming import Cancelled
from tests.unit.compat.conftest import MakeContext

DEADLINE_S = 60.0  # of what takes a moment, where it goes wrong


class Squares:
    """A handler that notes what its methods are called with, and with which piece."""

    def __init__(self) -> None:
        self.context: Any = None
        self.seen: dict[str, list[object]] = {method: [] for method in HANDLER_METHODS}
        self.pieces: list[int | None] = []
        self.batching: MicroBatching | None = None

    def preprocess(self, data: list[int]) -> list[int]:
        self.seen["preprocess"].append(data)
        return data

    def inference(self, data: list[int]) -> list[int]:
        self.seen["inference"].append(data)
        if self.batching is not None:
            self.pieces.append(self.batching.get_micro_batch_idx())
        return [value * value for value in data]

    def postprocess(self, data: list[int]) -> list[int]:
        self.seen["postprocess"].append(data)
        return data

    def _is_describe(self) -> bool:
        return bool(self.context.get_request_header(0, "describe"))

    def _is_explain(self) -> bool:
        return bool(self.context.get_request_header(0, "explain"))

    def describe_handle(self) -> str:
        return "squares"

    def explain_handle(self, inputs: list[int], data: list[int]) -> list[str]:
        return ["because"] * len(inputs)

    def _infer_with_profiler(self, data: list[int]) -> tuple[list[str], object]:
        return ["profiled"] * len(data), None


def test_a_batch_goes_through_in_pieces_and_comes_back_in_order() -> None:
    handler = Squares()
    handler.batching = MicroBatching(handler, micro_batch_size=2)
    assert handler.batching.handle([1, 2, 3, 4, 5]) == [1, 4, 9, 16, 25]
    assert handler.seen["inference"] == [[1, 2], [3, 4], [5]]
    assert handler.pieces == [0, 1, 2]
    assert handler.batching.get_micro_batch_idx() is None
    assert handler.batching.handle([]) == []


def test_inference_keeps_the_order_of_the_batch_whatever_preprocess_does() -> None:
    second_is_through = threading.Event()

    class Slow(Squares):
        def preprocess(self, data: list[int]) -> list[int]:
            if data == [1]:
                assert second_is_through.wait(DEADLINE_S)
            else:
                second_is_through.set()
            return [value + 10 for value in data]

    handler = Slow()
    assert MicroBatching(handler, 1, {"preprocess": 2}).handle([1, 2]) == [121, 144]
    assert handler.seen["inference"] == [[11], [12]]


def test_pieces_are_in_different_methods_at_the_same_time() -> None:
    meeting = threading.Barrier(2)

    class Met(Squares):
        def preprocess(self, data: list[int]) -> list[int]:
            if data == [2]:
                meeting.wait(DEADLINE_S)
            return data

        def inference(self, data: list[int]) -> list[int]:
            if data == [1]:
                meeting.wait(DEADLINE_S)
            return data

    assert MicroBatching(Met()).handle([1, 2]) == [1, 2]


@pytest.mark.parametrize("kind", [ValueError, Cancelled])
def test_the_first_piece_that_fails_fails_the_batch_and_the_next_batch_is_whole(kind: type[BaseException]) -> None:
    told = threading.Event()
    told_early = []

    class Picky(Squares):
        def inference(self, data: list[int]) -> list[int]:
            if data[0] < 0:
                raise kind(f"no {data[0]}")
            if data == [3]:
                told_early.append(told.wait(0.05))
            return super().inference(data)

    handler = Picky()
    batching = MicroBatching(handler)
    with pytest.raises(kind, match="no -2"):
        batching.handle([1, -2, 3, -4])
    told.set()
    assert told_early == [False]  # all of it is over when the error comes
    assert handler.seen["postprocess"] == [[1], [9]]
    assert batching.handle([5]) == [25]


def test_the_number_of_threads_can_be_changed() -> None:
    batching = MicroBatching(Squares(), 1, {"inference": 3})
    groups = batching.thread_groups
    assert [len(groups[method]) for method in HANDLER_METHODS] == [1, 3, 1]
    before = groups["inference"]
    batching.parallelism = {"inference": 1, "postprocess": 2}
    assert batching.parallelism == {"preprocess": 1, "inference": 1, "postprocess": 2}
    assert [len(groups[method]) for method in HANDLER_METHODS] == [1, 1, 2]
    assert not any(thread.is_alive() for thread in before)
    assert batching.handle([1, 2, 3]) == [1, 4, 9]
    batching.shutdown()
    assert groups == {method: [] for method in HANDLER_METHODS}


@pytest.mark.parametrize("parallelism", [{"inference": 0}, {"think": 1}])
def test_threads_that_make_no_sense_are_refused(parallelism: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="from 1 up"):
        MicroBatching(Squares(), 1, parallelism)


def test_the_threads_end_with_it() -> None:
    batching: MicroBatching | None = MicroBatching(Squares())
    assert batching is not None
    threads = [thread for group in batching.thread_groups.values() for thread in group]
    del batching
    gc.collect()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads)


def test_it_stands_in_for_handle(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENABLE_TORCH_PROFILER", raising=False)
    batching = MicroBatching(Squares(), 2)
    context = make_context()
    times: Any = context.metrics
    assert batching([1, 2, 3], context) == [1, 4, 9]
    assert times.names == ["HandlerTime"]
    assert batching([1, 2], make_context(headers={"explain": "True"})) == ["because", "because"]
    assert batching([1], make_context(headers={"describe": "True"})) == ["squares"]
    monkeypatch.setenv("ENABLE_TORCH_PROFILER", "1")
    assert batching([1, 2], context) == ["profiled", "profiled"]
