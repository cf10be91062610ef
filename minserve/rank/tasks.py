"""`asyncCommunication`: each batch is a task of the rank's event loop, and its answer leaves when it is ready.

For a worker of one rank alone: tasks of several ranks would take their turns in different orders, and their collectives
would pair up wrong.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from minserve.rank import coroutines, streaming
from minserve.rank.connection import Disconnected
from minserve.rank.data import Refused
from minserve.rank.failures import describe
from minserve.rank.probing import run_probe
from minserve.rank.streaming import Cancelled, Chunks
from minserve.wire.frames import PROBE, Kind
from minserve.wire.messages import Batch, Failure, Step, unpack

if TYPE_CHECKING:
    from collections.abc import Callable

    from minserve.rank.bodies import Bodies
    from minserve.rank.connection import Connection
    from minserve.rank.context import Context
    from minserve.rank.loading import Handler
    from minserve.rank.outbox import Outbox
    from minserve.wire.board import Slot
    from minserve.wire.frames import Frame
    from minserve.wire.messages import Answer, Buffer


class TaskStream(Chunks):
    """The stream of one batch among others. What may not go out yet is kept for the grant to come.

    `send` never waits, as TorchServe's function does not. An async generator waits: it is asked for its next chunk when the
    last one is out.
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
        super().__init__(connection, context, seq, count, granted, on_refused)
        self._kept: deque[list[tuple[Answer, Buffer]]] = deque()
        self._empty = asyncio.Event()
        self._empty.set()
        self._cancelled = False

    async def send_from_coroutine(self, chunks: object) -> None:
        """See `Chunks`."""
        self.send(chunks)
        await self.sent()

    async def sent(self) -> None:
        """Waits until nothing is kept any more.

        Raises:
            Cancelled: every client has left.
        """
        await self._empty.wait()
        if self._cancelled:
            raise Cancelled

    @property
    def cancelled(self) -> bool:
        """See `Chunks`."""
        return self._cancelled

    def grant(self, step: int) -> None:
        """The stream may go up to this step."""
        with self._sending:
            self._granted = step
            self._flush()

    def cancel(self) -> None:
        """Every client has left."""
        with self._sending:
            self._cancelled = True
            self._kept.clear()
            self._empty.set()

    def _take_step(self, chunks: Callable[[], list[object]]) -> None:
        with self._sending:
            if self._cancelled:
                raise Cancelled
            if not self._ended:
                self._kept.append(self._encode_step(chunks))
                self._flush()

    def _flush(self) -> None:
        while self._kept and self.step < self._granted:
            self.step += 1
            self._send_step(self._kept.popleft())
        if self._kept:
            self._empty.clear()
        else:  # somebody waits only while something is kept, and only a grant or a cancel, on the loop, ends that
            self._empty.set()


class Tasks:
    """Serves the batches of a rank, several at once.

    Args:
        context: the one that the handler was loaded with; each batch gets a copy.
        bodies: what makes the handler's data of a batch.
    """

    def __init__(
        self,
        connection: Connection,
        slot: Slot,
        outbox: Outbox,
        handler: Handler,
        context: Context,
        bodies: Bodies,
    ) -> None:
        self._connection = connection
        self._slot = slot
        self._outbox = outbox
        self._handler = handler
        self._context = context
        self._bodies = bodies
        self._last_seq = 0
        self._finished = 0
        self._batches: dict[int, tuple[asyncio.Task[None], TaskStream]] = {}
        self._end: asyncio.Future[int] | None = None

    def run(self) -> int:
        """Serves until SHUTDOWN. Returns the exit code.

        Raises:
            Disconnected: the server has closed the link.
            WireError: it has sent what is no frame.
        """
        return coroutines.event_loop().run_until_complete(self._serve())

    async def _serve(self) -> int:
        loop = asyncio.get_running_loop()
        self._end = loop.create_future()
        loop.add_reader(self._connection.socket, self._readable)
        if self._connection.pending:  # came along with LOAD
            loop.call_soon(self._readable)
        try:
            return await self._end
        finally:
            loop.remove_reader(self._connection.socket)
            left = [task for task, _ in self._batches.values()]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    # ── frames ──

    def _readable(self) -> None:
        assert self._end is not None
        try:
            for frame in self._connection.receive_ready():
                if not self._end.done():
                    self._take(frame)
        except Exception as error:
            self._break(error)

    def _take(self, frame: Frame) -> None:
        assert self._end is not None
        task, stream = self._batches.get(frame.seq, (None, None))
        if frame.kind is Kind.BATCH:
            if frame.seq != self._last_seq + 1:
                print(
                    f"minserve: rank 0 stops: got batch {frame.seq} after batch {self._last_seq}",
                    file=sys.stderr,
                    flush=True,
                )
                self._end.set_result(1)
                return
            self._last_seq = frame.seq
            self._slot.received(frame.seq)
            self._begin(frame)
        elif frame.kind is Kind.GRANT and stream is not None:
            stream.grant(unpack(Step, frame.meta).step)
        elif frame.kind is Kind.CANCEL and stream is not None and task is not None:
            stream.cancel()
            # Not before it has begun: it would tell nobody of its end.
            asyncio.get_running_loop().call_soon(task.cancel)
        elif frame.kind is Kind.SHUTDOWN:
            self._end.set_result(0)
        # CONTINUE is for ranks that wait for others.

    def _begin(self, frame: Frame) -> None:
        batch = unpack(Batch, frame.meta)
        context = copy.deepcopy(self._context)
        context.begin_batch(batch.requests)
        count, refused = len(batch.parts), self._outbox.refused_chunk
        stream = TaskStream(self._connection, context, frame.seq, count, batch.grant, refused)
        context.stream = stream
        task = asyncio.get_running_loop().create_task(self._run(frame, batch, context, stream))
        self._batches[frame.seq] = task, stream

    # ── a batch ──

    async def _run(self, frame: Frame, batch: Batch, context: Context, stream: TaskStream) -> None:
        try:
            await self._work(frame, batch, context, stream)
        except Exception as error:  # the link is gone
            self._break(error)
        finally:
            del self._batches[frame.seq]
            # The board has one number for it, and who looks there wants to know whether this rank comes along at all.
            self._finished = max(self._finished, frame.seq)
            self._slot.finished(self._finished)

    async def _work(self, frame: Frame, batch: Batch, context: Context, stream: TaskStream) -> None:
        assert self._end is not None
        seq, count = frame.seq, len(batch.parts)
        streaming.set_current_of_task(stream)
        began = time.monotonic()
        try:
            if frame.flags & PROBE:
                answers: object = run_probe(self._handler)
            else:
                data = self._bodies.decode(batch, frame.body)
                answers = await _collect(self._handler.handle(data, context), stream)
                await stream.sent()
            self._outbox.answer(answers, stream, context, seq, count, time.monotonic() - began)
        except Disconnected:
            raise
        except Refused as refusal:
            self._outbox.refused(refusal, seq)
        except (Exception, asyncio.CancelledError, Cancelled) as error:
            stream.end()
            if self._end.done():
                return  # nobody waits for an answer any more
            if stream.cancelled and not isinstance(error, Exception):
                self._outbox.failed(Failure("cancelled", "", "every client has left", "", "", 0, (0,)), seq)
            else:
                self._outbox.failed(describe(error, 0, 1), seq)

    def _break(self, error: Exception) -> None:
        assert self._end is not None
        if not self._end.done():
            self._end.set_exception(error)


async def _collect(answers: object, stream: TaskStream) -> object:
    """What a call of `handle` comes to."""
    if inspect.isawaitable(answers):
        answers = await answers
    if inspect.isasyncgen(answers):
        return await coroutines.yield_all(answers, stream)
    if not inspect.isgenerator(answers):
        return answers
    try:
        while True:
            try:
                chunks = next(answers)
            except StopIteration as end:
                return end.value if end.value is not None else [b""] * stream.count
            await stream.send_from_coroutine(chunks)
    finally:
        answers.close()
