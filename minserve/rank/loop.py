"""A rank's main thread: take a frame, check its seq, run the handler, answer if this is rank 0, take the next."""

from __future__ import annotations

import gc
import inspect
import logging
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

import minserve
from minserve.rank import progress, streaming
from minserve.rank.connection import Disconnected
from minserve.rank.context import Context
from minserve.rank.data import Refused, check_answers, decode_batch
from minserve.rank.failures import describe, issued_collectives
from minserve.rank.loading import Handler, load_handler
from minserve.rank.streaming import Stream
from minserve.wire.frames import Kind
from minserve.wire.messages import Answer, Answers, Batch, Failure, Load, Loaded, Progress, unpack

if TYPE_CHECKING:
    from minserve.rank.connection import Connection
    from minserve.rank.process import Launch
    from minserve.wire.frames import Frame
    from minserve.wire.messages import Buffer

logger = logging.getLogger(__name__)


class Rank:
    """One rank of a worker, after its HELLO."""

    def __init__(self, launch: Launch, connection: Connection) -> None:
        self._rank = launch.rank
        self._local_rank = launch.local_rank
        self._world_size = launch.world_size
        self._connection = connection
        self._parked: deque[Frame] = deque()  # frames met while this rank waited for CONTINUE
        self._last_seq = 0
        self._reply_done = False

    def run(self) -> int:
        """Loads, then serves until SHUTDOWN or until the server is gone. Returns the exit code."""
        progress.listen(lambda stage, done, total: self._connection.send(Kind.PROGRESS, Progress(stage, done, total)))
        try:
            frame = self._connection.receive()
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
        self._connection.send(Kind.LOADED, Loaded(time.monotonic() - began))
        return handler

    def _local_device(self, load: Load) -> int | None:
        """Index of this rank's device among those its worker owns; all its ranks see the same mask."""
        return self._local_rank if load.gpu else None

    # ── serve ──

    def _serve(self, handler: Handler) -> int:
        while True:
            frame = self._parked.popleft() if self._parked else self._connection.receive()
            if frame.kind is Kind.BATCH:
                if frame.seq != self._last_seq + 1:
                    # Going on would pair this rank's collectives with the wrong batch of the others.
                    return self._stop(f"got batch {frame.seq} after batch {self._last_seq}")
                self._last_seq = frame.seq
                self._run_batch(handler, frame)
            elif frame.kind is Kind.SHUTDOWN:
                handler.close()
                return 0
            # CONTINUE for a batch that this rank has left without an exception is not for it. GRANT and CANCEL for a batch
            # that has ended come too late, DRAIN asks nothing of a rank that has nothing queued.

    def _run_batch(self, handler: Handler, frame: Frame) -> None:
        batch = unpack(Batch, frame.meta)
        self._context.begin_batch(batch.requests)
        stream = Stream(
            self._connection, self._context, frame.seq, len(batch.requests), self._rank == 0, self._refused_chunk
        )
        data = decode_batch(batch, frame.body)
        streaming.set_current(stream)
        before = issued_collectives()
        try:
            answers = handler.handle(data, self._context)
            if inspect.isgenerator(answers):
                answers = yield_all(answers, stream)
            self._answer(answers, stream, frame.seq, len(batch.requests))
        except Refused as refusal:
            self._report(Failure("refused", "", str(refusal), "", "", self._rank, ()), frame.seq)
        except Exception as error:
            issued = issued_collectives() - before
            self._report(describe(error, self._rank, self._world_size, issued), frame.seq)
            self._wait_for_continue(frame.seq)
        finally:
            streaming.set_current(None)

    def _answer(self, answers: object, stream: Stream, seq: int, count: int) -> None:
        if self._rank != 0:
            logger.debug("skip sending response at rank %d", self._rank)
            if self._reply_done:
                self._connection.send(Kind.DONE, Answers(()), seq)
            return
        if stream.muted:  # refused in mid-stream: the server has been told
            return
        if answers is None and stream.step:
            answers = [b""] * count  # a stream need not have a last chunk
        values = check_answers(answers, count)
        encoded = [streaming.encode(self._context, index, value) for index, value in enumerate(values)]
        metas: list[Answer] = [answer for answer, _ in encoded]
        bodies: list[Buffer] = [body for _, body in encoded]
        self._connection.send_with_body(Kind.REPLY, Answers(tuple(metas), stream.step), bodies, seq)

    # ── failures ──

    def _refused_chunk(self, refusal: Refused) -> None:
        self._report(Failure("refused", "", str(refusal), "", "", self._rank, ()), self._last_seq)

    def _report(self, failure: Failure, seq: int) -> None:
        self._connection.send(Kind.ERROR, failure, seq)

    def _wait_for_continue(self, seq: int) -> None:
        """Goes no further until the server knows that every rank has left the batch.

        If only this rank has, its next collective would meet the others in this batch, and the sums would be wrong.
        """
        while True:
            frame = self._connection.receive()
            if frame.kind is Kind.CONTINUE and frame.seq == seq:
                return
            if frame.kind is Kind.SHUTDOWN:
                raise Disconnected
            self._parked.append(frame)

    def _stop(self, reason: str) -> int:
        print(f"minserve: rank {self._rank} stops: {reason}", file=sys.stderr, flush=True)
        return 1


def yield_all(answers: object, stream: Stream) -> object:
    """Sends what a generator yields, a step each; what it returns in the end is its last chunk, if anything."""
    assert inspect.isgenerator(answers)
    while True:
        try:
            stream.send(next(answers))
        except StopIteration as end:
            return end.value if end.value is not None else [b""] * stream.count
