"""Micro-batching: a batch is cut into pieces that go through preprocess, inference and postprocess at the same time."""

from __future__ import annotations

import os
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

HANDLER_METHODS = ("preprocess", "inference", "postprocess")


class _MicroBatch:
    """A piece of a batch on its way through the three methods."""

    def __init__(self, index: int, data: Sequence[object]) -> None:
        self.index = index
        self.value: Any = data
        self.error: BaseException | None = None
        self._passed = {method: threading.Event() for method in HANDLER_METHODS}

    def run(self, method: str, call: Callable[[Any], Any]) -> None:
        """Waits until the method before has passed, then calls this one, unless an earlier one has failed."""
        place = HANDLER_METHODS.index(method)
        if place:
            self._passed[HANDLER_METHODS[place - 1]].wait()
        try:
            if self.error is None:
                self.value = call(self.value)
        except BaseException as error:  # also minserve.Cancelled: it is for the thread that waits for this piece
            self.error = error
        finally:
            self._passed[method].set()

    def wait(self) -> None:
        """Until it has passed the last method."""
        self._passed[HANDLER_METHODS[-1]].wait()


_Queue = queue.SimpleQueue["_MicroBatch | None"]  # None ends one thread


class MicroBatching:
    """Put it in place of a handler's `handle`: `self.handle = MicroBatching(self)`.

    Each method has threads of its own. They take the pieces in the order of the batch, so that with one thread a method
    works in the same order on every rank: collectives need that, and only one of the methods may have any.

    Args:
        parent_handler: has the three methods, and those of `BaseHandler` that `handle` calls.
        micro_batch_size: most requests in a piece.
        parallelism: threads of each method, 1 where nothing is said: {"preprocess": 2}.

    Attributes:
        handler: the parent handler.
        micro_batch_size: see above; may be changed between batches.
        thread_groups: the threads by method.

    Raises:
        ValueError: `parallelism` has another name than the methods', or a number below 1.
    """

    def __init__(
        self, parent_handler: Any, micro_batch_size: int = 1, parallelism: Mapping[str, int] | None = None
    ) -> None:
        self.handler = parent_handler
        self.micro_batch_size = micro_batch_size
        self.thread_groups: dict[str, list[threading.Thread]] = {method: [] for method in HANDLER_METHODS}
        self.thread_local_data = threading.local()
        self._queues: dict[str, _Queue] = {method: queue.SimpleQueue() for method in HANDLER_METHODS}
        self._parallelism: dict[str, int] = {}
        # All start here, not with the first batch: at its end minserve waits for the threads that began in it.
        self.parallelism = dict.fromkeys(HANDLER_METHODS, 1) | dict(parallelism or {})

    def __del__(self) -> None:
        for method, threads in getattr(self, "thread_groups", {}).items():
            for _ in threads:
                self._queues[method].put(None)

    @property
    def parallelism(self) -> dict[str, int]:
        """Threads of each method. Setting it changes those that it names, and waits for what they work on."""
        return dict(self._parallelism)

    @parallelism.setter
    def parallelism(self, parallelism: Mapping[str, int]) -> None:
        for method, threads in parallelism.items():
            if method not in HANDLER_METHODS or threads < 1:
                raise ValueError(f"parallelism is a number from 1 up for each of {HANDLER_METHODS}, not {parallelism}")
        for method, threads in parallelism.items():
            if threads != len(self.thread_groups[method]):
                self._end(method)
                self.thread_groups[method] = [self._start(method) for _ in range(threads)]
            self._parallelism[method] = threads

    def shutdown(self) -> None:
        """Ends all threads, after what they work on."""
        for method in HANDLER_METHODS:
            self._end(method)

    def get_micro_batch_idx(self) -> int | None:
        """Place in the batch of the piece that the calling thread works on; None outside the three methods."""
        return getattr(self.thread_local_data, "micro_batch_idx", None)

    def handle(self, data: Sequence[object]) -> list[Any]:
        """Takes a batch through the three methods. No piece is under way any more when it returns or raises.

        Raises:
            Exception: what the first of the pieces that failed has raised.
        """
        size = self.micro_batch_size
        pieces = [
            _MicroBatch(index, data[start : start + size]) for index, start in enumerate(range(0, len(data), size))
        ]
        for method in HANDLER_METHODS:
            for piece in pieces:
                self._queues[method].put(piece)
        for piece in pieces:
            piece.wait()
        for piece in pieces:
            if piece.error is not None:
                raise piece.error
        return [answer for piece in pieces for answer in piece.value]

    def __call__(self, data: list[Any], context: Any) -> Any:
        """What `BaseHandler.handle` does, in pieces. A description or an explanation is made in one."""
        began = time.perf_counter()
        self.handler.context = context
        if self.handler._is_describe():
            output: Any = [self.handler.describe_handle()]
        elif os.environ.get("ENABLE_TORCH_PROFILER"):
            output, _ = self.handler._infer_with_profiler(data=data)
        elif self.handler._is_explain():
            output = self.handler.explain_handle(self.handler.preprocess(data), data)
        else:
            output = self.handle(data)
        context.metrics.add_time("HandlerTime", round((time.perf_counter() - began) * 1000, 2), None, "ms")
        return output

    def _start(self, method: str) -> threading.Thread:
        # Nothing in the thread refers to this object, so that it can be collected and end them.
        arguments = (method, getattr(self.handler, method), self._queues[method], self.thread_local_data)
        thread = threading.Thread(target=_work, args=arguments, name=f"micro-batching {method}", daemon=True)
        thread.start()
        return thread

    def _end(self, method: str) -> None:
        for _ in self.thread_groups[method]:
            self._queues[method].put(None)
        for thread in self.thread_groups[method]:
            thread.join()
        self.thread_groups[method] = []


def _work(method: str, call: Callable[[Any], Any], pieces: _Queue, local: threading.local) -> None:
    for piece in iter(pieces.get, None):
        local.micro_batch_idx = piece.index
        piece.run(method, call)
