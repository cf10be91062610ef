"""A streaming answer on the rank's side: chunks go out from rank 0 alone, every rank counts the steps.

A handler streams by yielding lists from a generator, or by calling `send_intermediate_predict_response`. Both run on every
rank, so that the collectives between the steps stay paired.

No rank takes a step that the server has not granted. A client that reads slowly so holds all ranks at the same step, and
when the clients have left no more is granted: every rank is told so at the step behind the last granted one, and all leave
the batch there, in step.
"""

from __future__ import annotations

import logging
import re
import threading
from abc import ABC, abstractmethod
from contextvars import ContextVar
from typing import TYPE_CHECKING

from minserve.rank.context import are_plain
from minserve.rank.data import Refused, check_answers, encode_answer
from minserve.wire.frames import Kind
from minserve.wire.messages import Answer, Answers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from minserve.rank.connection import Connection
    from minserve.rank.context import Context
    from minserve.rank.inbox import Inbox
    from minserve.wire.board import Slot
    from minserve.wire.messages import Buffer

# What HTTP forbids in a header's value (RFC 9110, 5.5), and lone surrogates, which have no UTF-8; what a name is made of.
_UNSENDABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")

logger = logging.getLogger(__name__)


class Cancelled(BaseException):
    """Every client of the batch has left, or the worker ends: raised by `send` on every rank at the same step.

    A BaseException, so that a handler's `except Exception` around its work does not swallow it.
    """


class Chunks(ABC):
    """What the streams of all batches have in common.

    Args:
        seq: of the batch.
        granted: the step up to which it may go before it needs a grant.
        on_refused: told once, with the seq, when a chunk cannot be sent. The handler is not stopped for it, for the other
            ranks would go on: it takes its steps, without chunks, to its end or until the server cancels the stream on all.

    Attributes:
        step: how many have been taken.
        refused: a chunk could not be sent, and the server knows.
        runs: how often a pipeline has been run in the batch.
        at_end: what a pipeline has to do when the handler is through with the batch.
        apart: collectives that were issued in this process while it ran: its own, and those of batches beside this one.
    """

    def __init__(
        self,
        connection: Connection,
        context: Context,
        seq: int,
        count: int,
        granted: int,
        on_refused: Callable[[Refused, int], None],
    ) -> None:
        self._connection = connection
        self._context = context
        self.seq = seq
        self.count = count
        self._granted = granted
        self._on_refused = on_refused
        self.step = 0
        self.refused = False
        self.runs = 0
        self.at_end: Callable[[], None] | None = None
        self.apart = 0
        self._ended = False
        self._sending = threading.RLock()

    def send(self, chunks: object) -> None:
        """One step: a chunk for each request of the batch, None for a request that gets none.

        Raises:
            Cancelled: every client has left; this step is not taken.
        """
        self._take_step(lambda: check_answers(chunks, self.count))

    @abstractmethod
    async def send_from_coroutine(self, chunks: object) -> None:
        """The same, and while it waits for its grant the event loop goes on.

        Raises:
            Cancelled: every client has left; this step is not taken.
        """

    def send_some(self, chunks: object, request_ids: Mapping[int, str]) -> None:
        """One step with chunks for some requests of the batch, in the order of `request_ids`: {index: request id}.

        A thread that an earlier batch has left behind is told by the ids: its chunks are for nobody here.

        Raises:
            Cancelled: every client has left; this step is not taken.
        """
        ids = self._context.request_ids or {}
        # The whole batch's are nearly always those of the context itself.
        if request_ids is not ids and any(ids.get(index) != request_id for index, request_id in request_ids.items()):
            logger.warning("dropped a chunk for requests that are not in this batch: %s", list(request_ids.values()))
            return

        def by_index() -> list[object]:
            if not isinstance(chunks, list | tuple) or len(chunks) != len(request_ids):
                raise Refused(f"an intermediate response needs one chunk for each of {len(request_ids)} requests")
            values: list[object] = [None] * self.count
            for index, chunk in zip(request_ids, chunks, strict=True):
                values[index] = chunk
            return values

        self._take_step(by_index)

    @property
    @abstractmethod
    def cancelled(self) -> bool:
        """Whether its clients have left and the server has said so."""

    def end(self) -> None:
        """Nothing goes out any more: a thread may still send, but behind the batch's last frame a chunk is for nobody."""
        with self._sending:
            self._ended = True

    @abstractmethod
    def _take_step(self, chunks: Callable[[], list[object]]) -> None:
        """Takes a step with these chunks; called only once it is clear that they are wanted."""

    def _encode_step(self, chunks: Callable[[], list[object]]) -> list[tuple[Answer, Buffer]]:
        """What goes out; status and headers are what the context says at this moment."""
        if self.refused:
            return []
        try:
            return [encode(self._context, index, chunk) for index, chunk in enumerate(chunks()) if chunk is not None]
        except Refused as refusal:
            self.refused = True
            self._on_refused(refusal, self.seq)
            return []

    def _send_step(self, encoded: list[tuple[Answer, Buffer]]) -> None:
        """A step without chunks is told, too: the server grants by what it has seen."""
        answers = Answers(tuple([answer for answer, _ in encoded]), self.step)  # a list costs less than a generator
        self._connection.send_answers(Kind.CHUNK, answers, [body for _, body in encoded], self.seq)


class Stream(Chunks):
    """The stream of one batch, in step with the other ranks. A handler may send from any thread, but from one at a time.

    Args:
        inbox: where grants come.
        slot: where the steps are shown.
        answering: whether this is rank 0.
    """

    def __init__(
        self,
        connection: Connection,
        inbox: Inbox,
        slot: Slot,
        context: Context,
        seq: int,
        count: int,
        granted: int,
        answering: bool,
        on_refused: Callable[[Refused, int], None],
    ) -> None:
        super().__init__(connection, context, seq, count, granted, on_refused)
        self._inbox = inbox
        self._slot = slot
        self._answering = answering

    async def send_from_coroutine(self, chunks: object) -> None:
        """See `Chunks`."""
        if self.step < max(self._granted, self._inbox.granted(self.seq)):
            self.send(chunks)
            return
        import asyncio  # there is a loop, so it is imported

        await asyncio.get_running_loop().run_in_executor(None, self.send, chunks)

    @property
    def cancelled(self) -> bool:
        """See `Chunks`."""
        return self._inbox.cancelled(self.seq)

    def _begin_step(self) -> None:
        # The step is shown before it is waited for: the server cancels only once every rank has been seen to count steps.
        self._slot.stepped(self.seq, self.step + 1)
        if self.step >= self._granted:
            if not self._inbox.wait_for_grant(self.seq, self.step + 1):
                raise Cancelled
            self._granted = self._inbox.granted(self.seq)
        self.step += 1

    def _take_step(self, chunks: Callable[[], list[object]]) -> None:
        self._begin_step()
        with self._sending:
            if self._answering and not self._ended:
                self._send_step(self._encode_step(chunks))


def encode(context: Context, index: int, value: object) -> tuple[Answer, Buffer]:
    """One request's answer with the status and headers that the handler has set for it.

    Raises:
        Refused: the body, the status or a header cannot be sent.
    """
    body = encode_answer(value, index)
    if are_plain(context):
        return Answer(index, len(body)), body
    processor = context.request_processor[index]
    status = processor.status
    if type(status) is int and status == 200 and not processor.phrase and not processor.response_headers:  # the rule
        return Answer(index, len(body)), body
    headers = tuple(processor.response_headers.items())
    if not isinstance(status, int) or not 200 <= status <= 599:  # an HTTPStatus is an int
        raise Refused(f"answer {index}: response status {status!r} is not a number from 200 to 599")
    if not isinstance(processor.phrase, str) or _UNSENDABLE.search(processor.phrase):
        raise Refused(f"answer {index}: bad reason phrase {processor.phrase!r}")
    for name, text in headers:
        if not isinstance(name, str) or not isinstance(text, str):
            raise Refused(f"answer {index}: response header {name!r} must be text, it is of type {type(text).__name__}")
        if not _TOKEN.fullmatch(name) or _UNSENDABLE.search(text):
            raise Refused(f"answer {index}: bad response header {name!r}: {text!r}")
    return Answer(index, len(body), status, processor.phrase, headers), body


_current: Chunks | None = None
_of_task: ContextVar[Chunks | None] = ContextVar("stream", default=None)


def current() -> Chunks | None:
    """The stream of the batch that this rank, or this task, works on, for `send_intermediate_predict_response`."""
    return _of_task.get() or _current


def stream_of(context: Context | None) -> Chunks | None:
    """The stream of the batch that a context is for: its own, where several are under way at once."""
    own = context.stream if context is not None else None
    return own if own is not None else current()


def set_current(stream: Chunks | None) -> None:
    """Sets it; only the loop does."""
    global _current  # a rank works on one batch at a time, and TorchServe's function is given no handle to it
    _current = stream


def set_current_of_task(stream: Chunks) -> None:
    """Sets it for the task that calls this, and for the threads that it asks asyncio for."""
    _of_task.set(stream)
