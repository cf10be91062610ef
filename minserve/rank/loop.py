"""A rank's main thread: take a frame, check its seq, run the handler, answer if this is rank 0, take the next."""

from __future__ import annotations

import gc
import inspect
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

import minserve
from minserve.rank import progress, streaming, threads
from minserve.rank.connection import Disconnected
from minserve.rank.context import Context
from minserve.rank.data import Refused, check_answers, decode_batch
from minserve.rank.failures import describe, issued_collectives
from minserve.rank.inbox import Inbox
from minserve.rank.loading import Handler, load_handler
from minserve.rank.streaming import Cancelled, Stream
from minserve.wire.frames import PROBE, Kind
from minserve.wire.messages import Answer, Answers, Batch, Failure, Load, Loaded, Progress, unpack

if TYPE_CHECKING:
    from minserve.rank.connection import Connection
    from minserve.rank.process import Launch
    from minserve.wire.board import Slot
    from minserve.wire.frames import Frame
    from minserve.wire.messages import Buffer

logger = logging.getLogger(__name__)


class ProbeFailed(Exception):
    """The handler's probe says that this rank is not healthy."""


class Rank:
    """One rank of a worker, after its HELLO.

    Args:
        slot: this rank's on the board.
    """

    def __init__(self, launch: Launch, connection: Connection, slot: Slot) -> None:
        self._rank = launch.rank
        self._local_rank = launch.local_rank
        self._world_size = launch.world_size
        self._connection = connection
        self._slot = slot
        self._inbox = Inbox(connection)
        self._last_seq = 0
        self._reply_done = False

    def run(self) -> int:
        """Loads, then serves until SHUTDOWN or until the server is gone. Returns the exit code."""
        threads.ignore_cancelled(Cancelled)
        progress.listen(lambda stage, done, total: self._connection.send(Kind.PROGRESS, Progress(stage, done, total)))
        try:
            frame = self._inbox.next()
            if frame.kind is not Kind.LOAD:
                return self._stop(f"expected LOAD, got {frame.kind.name}")
            handler = self._load(unpack(Load, frame.meta), bytes(frame.body))
            if handler is None:
                # The server kills the group; it still reads this rank's pipe, so leave the reason there, too.
                return 1
            return self._serve(handler)
        except Disconnected:
            return 0

    # ── load ──

    def _load(self, load: Load, text: bytes) -> Handler | None:
        began = time.monotonic()
        progress.report_progress("importing")
        self._reply_done = load.reply_done
        try:
            self._context = Context(
                load.model,
                load.model_dir,
                {"model": {"modelName": load.model, "modelVersion": load.version, "handler": load.handler}},
                yaml.safe_load(text) or {},
                load.batch_size,
                self._local_device(load),
                minserve.__version__,
            )
            handler = load_handler(Path(load.model_dir), load.handler, self._context)
        except (Exception, SystemExit) as error:
            failure = describe(error, self._rank, self._world_size)
            self._connection.send(Kind.FAILED, failure)
            return None
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not walk through all of torch in the middle of a batch
        self._connection.send(Kind.LOADED, Loaded(time.monotonic() - began, handler.probe is not None))
        return handler

    def _local_device(self, load: Load) -> int | None:
        """Index of this rank's device among those its worker owns; all its ranks see the same mask."""
        return self._local_rank if load.gpu else None

    # ── serve ──

    def _serve(self, handler: Handler) -> int:
        while True:
            frame = self._inbox.next()
            if frame.kind is Kind.BATCH:
                if frame.seq != self._last_seq + 1:
                    # Going on would pair this rank's collectives with the wrong batch of the others.
                    return self._stop(f"got batch {frame.seq} after batch {self._last_seq}")
                self._last_seq = frame.seq
                self._slot.received(frame.seq)
                self._run_batch(handler, frame)
                self._slot.finished(frame.seq)
                self._inbox.finished(frame.seq)
            elif frame.kind is Kind.SHUTDOWN:
                handler.close()
                return 0

    def _run_batch(self, handler: Handler, frame: Frame) -> None:
        batch = unpack(Batch, frame.meta)
        seq, count = frame.seq, len(batch.requests)
        self._context.begin_batch(batch.requests)
        stream = Stream(
            self._connection,
            self._inbox,
            self._slot,
            self._context,
            seq,
            count,
            batch.grant,
            self._rank == 0,
            self._refused_chunk,
        )
        data = decode_batch(batch, frame.body)
        streaming.set_current(stream)
        others = threads.alive()
        before = issued_collectives()
        try:
            if frame.flags & PROBE:
                self._answer(_probe(handler), stream, seq, 0)
            else:
                answers = handler.handle(data, self._context)
                if inspect.isgenerator(answers):
                    answers = yield_all(answers, stream)
                self._answer(answers, stream, seq, count)
        except Refused as refusal:
            self._report(Failure("refused", "", str(refusal), "", "", self._rank, ()), seq)
        except (Exception, Cancelled) as error:
            issued = issued_collectives() - before
            stream.end()
            failure = self._failure(error, stream, issued)
            if stream.cancelled:  # every rank leaves at the same step; what its threads are still at comes first
                threads.wait_for_end(others)
            self._report(failure, seq)
            self._inbox.wait_for_continue(seq)
        finally:
            streaming.set_current(None)
            if stream.cancelled:
                threads.wait_for_end(others)

    def _answer(self, answers: object, stream: Stream, seq: int, count: int) -> None:
        if self._rank != 0:
            logger.debug("skip sending response at rank %d", self._rank)
            if self._reply_done or not count:
                self._connection.send(Kind.DONE, Answers(()), seq)
            return
        stream.end()
        if stream.refused or (answers is None and stream.step):
            answers = [b""] * count  # a stream need not have a last chunk
        values = check_answers(answers, count)
        encoded = [streaming.encode(self._context, index, value) for index, value in enumerate(values)]
        metas: list[Answer] = [answer for answer, _ in encoded]
        bodies: list[Buffer] = [body for _, body in encoded]
        self._connection.send_with_body(Kind.REPLY, Answers(tuple(metas), stream.step), bodies, seq)

    # ── failures ──

    def _failure(self, error: BaseException, stream: Stream, issued: int) -> Failure:
        """What to report of an exception that has left a handler.

        Raises:
            Disconnected, WireError: nothing; it came from the link, or the worker ends.
        """
        if self._inbox.broken is not None:
            raise self._inbox.broken from None
        if isinstance(error, Cancelled):
            if stream.cancelled:
                everyone = tuple(range(self._world_size))
                return Failure("cancelled", "", "every client has left", "", "", self._rank, everyone)
            if self._inbox.stopping:
                raise Disconnected from None
            # Kept by the handler from an earlier batch, for this one's clients are there. An error like any other.
        return describe(error, self._rank, self._world_size, issued)

    def _refused_chunk(self, refusal: Refused) -> None:
        self._report(Failure("chunk", "", str(refusal), "", "", self._rank, ()), self._last_seq)

    def _report(self, failure: Failure, seq: int) -> None:
        self._connection.send(Kind.ERROR, failure, seq)

    def _stop(self, reason: str) -> int:
        print(f"minserve: rank {self._rank} stops: {reason}", file=sys.stderr, flush=True)
        return 1


def yield_all(answers: object, stream: Stream) -> object:
    """Sends what a generator yields, a step each; what it returns in the end is its last chunk, if anything."""
    assert inspect.isgenerator(answers)
    try:
        while True:
            try:
                stream.send(next(answers))
            except StopIteration as end:
                return end.value if end.value is not None else [b""] * stream.count
    finally:
        answers.close()  # after a cancel: its own clean-up runs now, not when it is collected


def _probe(handler: Handler) -> list[object]:
    """Runs the handler's own check; the answer to a probe has no requests and so no answers."""
    healthy = handler.probe() if handler.probe is not None else True
    if healthy not in (True, None):
        raise ProbeFailed(f"probe() answered {healthy!r}; True or None means healthy")
    return []
