"""A rank's main thread: take a frame, check its seq, run the handler, answer if this is rank 0, take the next."""

from __future__ import annotations

import functools
import gc
import inspect
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import minserve
from minserve.rank import coroutines, overlap, progress, scheduling, streaming, threads
from minserve.rank.bodies import Bodies
from minserve.rank.connection import Disconnected
from minserve.rank.context import Context
from minserve.rank.data import Refused
from minserve.rank.failures import describe, issued_collectives
from minserve.rank.inbox import Inbox
from minserve.rank.loading import Handler, load_handler
from minserve.rank.metric_cache import MetricsCache
from minserve.rank.outbox import Outbox
from minserve.rank.probing import run_probe
from minserve.rank.streaming import Cancelled, Stream
from minserve.wire.frames import PROBE, Kind
from minserve.wire.messages import Batch, Failure, Load, Loaded, Progress, unpack

if TYPE_CHECKING:
    from collections.abc import Generator

    from minserve.rank.connection import Connection
    from minserve.rank.process import Launch
    from minserve.wire.board import Slot
    from minserve.wire.frames import Frame
    from minserve.wire.views import Views


class Rank:
    """One rank of a worker, after its HELLO.

    Args:
        slot: this rank's on the board.
        shared: where large bodies lie, if there is shared memory.
    """

    def __init__(self, launch: Launch, connection: Connection, slot: Slot, shared: Views | None = None) -> None:
        self._rank = launch.rank
        self._local_rank = launch.local_rank
        self._world_size = launch.world_size
        self._connection = connection
        self._slot = slot
        self._inbox = Inbox(connection)
        self._shared = shared
        self._last_seq = 0
        # From LOAD.
        self._outbox = Outbox(connection, launch.rank, reply_done=False)
        self._bodies = Bodies(shared)
        self._together = launch.world_size  # how many ranks run each batch
        self._plan: overlap.Plan | None = None  # of having several batches at work
        self._overlap: overlap.Overlap | None = None  # where they are

    def run(self) -> int:
        """Loads, then serves until SHUTDOWN or until the server is gone. Returns the exit code."""
        threads.ignore_cancelled(Cancelled)
        progress.listen(lambda stage, done, total: self._connection.send(Kind.PROGRESS, Progress(stage, done, total)))
        try:
            frame = self._connection.receive()  # what came with it stays there for whoever serves
            if frame.kind is not Kind.LOAD:
                return self._stop(f"expected LOAD, got {frame.kind.name}")
            load = unpack(Load, frame.meta)
            handler = self._load(load, bytes(frame.body))
            if handler is None:
                # The server kills the group; it still reads this rank's pipe, so leave the reason there, too.
                return 1
            serve = self._serve
            if load.asynchronous and self._world_size == 1:
                serve = self._serve_tasks
            elif self._plan is not None and self._plan.starts_them:
                serve = self._serve_overlapping
            code = serve(handler)
            if code == 0:
                coroutines.complete(handler.close())
                coroutines.close()
            return code
        except Disconnected:
            return 0

    # ── load ──

    def _load(self, load: Load, text: bytes) -> Handler | None:
        began = time.monotonic()
        progress.report_progress("importing")
        self._outbox = Outbox(self._connection, self._rank, load.reply_done)
        self._bodies = Bodies(self._shared, load.decode_input, load.views)
        self._connection.quiet = self._rank > 0 and not load.reply_done
        self._connection.spin = load.spin
        if load.wait_for_cores:
            scheduling.wait_for_cores()
        if load.predict_on == "rank0":
            self._together = 1
        try:
            self._context = self._new_context(load, yaml.safe_load(text) or {})
            archive = bool(load.manifest)
            handler = load_handler(Path(load.model_dir), load.handler, self._context, load.envelope, archive)
        except (Exception, SystemExit) as error:
            self._outbox.load_failed(describe(error, self._rank, self._world_size))
            return None
        scheduling.let_gloo_wait_for_cores()
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not walk through all of torch in the middle of a batch
        self._plan = self._choose_plan(load, handler)
        in_flight = self._plan.batches if self._plan is not None else 0
        self._outbox.loaded(Loaded(time.monotonic() - began, handler.probe is not None, in_flight))
        return handler

    def _choose_plan(self, load: Load, handler: Handler) -> overlap.Plan | None:
        """How the model can have several batches at work; None if it cannot, or shall not."""
        plan = overlap.planned()
        if plan is None or load.in_flight == 1 or self._together < self._world_size:
            return None
        # On one event loop a coroutine that waits in `Pipeline.run` holds up all others.
        if inspect.iscoroutinefunction(handler.handle) or inspect.isasyncgenfunction(handler.handle):
            return None
        return plan if load.in_flight == 0 else replace(plan, batches=load.in_flight)

    def _new_context(self, load: Load, config: dict[str, object]) -> Context:
        made_up = {"model": {"modelName": load.model, "modelVersion": load.version, "handler": load.handler}}
        declared = MetricsCache(model_name=load.model)
        declared.declare(load.metrics)
        return Context(
            load.model,
            load.model_dir,
            json.loads(load.manifest) if load.manifest else made_up,
            load.batch_size,
            self._local_device(load),
            minserve.__version__,
            load.limit_max_image_pixels,
            declared,
            config,
        )

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
                return 0

    def _serve_tasks(self, handler: Handler) -> int:
        """Several batches at once, each a task of the event loop."""
        from minserve.rank.tasks import Tasks  # brings asyncio along

        return Tasks(self._connection, self._slot, self._outbox, handler, self._context, self._bodies).run()

    def _serve_overlapping(self, handler: Handler) -> int:
        """Several batches at once, each on a thread of its own."""
        assert self._plan is not None
        run = functools.partial(self._run_batch, handler)
        self._overlap = overlap.Overlap(self._inbox, self._slot, self._context, handler, self._plan, run)
        try:
            self._overlap.serve()
        except overlap.OutOfOrder as error:
            return self._stop(str(error))
        return 0

    def _run_batch(self, handler: Handler, frame: Frame, context: Context | None = None) -> None:
        context = self._context if context is None else context
        batch = unpack(Batch, frame.meta)
        seq, count = frame.seq, len(batch.parts)
        if self._rank >= self._together and count:
            self._bodies.skip(batch)
            self._outbox.through(seq, count)  # rank 0 runs it alone
            return
        context.begin_batch(batch.requests)
        stream = Stream(
            self._connection,
            self._inbox,
            self._slot,
            context,
            seq,
            count,
            batch.grant,
            self._rank == 0,
            self._outbox.refused_chunk,
        )
        if self._overlap is not None:
            context.stream = stream  # for the handler's threads, which may send while another batch has its turn
        data = self._bodies.decode(batch, frame.body)
        streaming.set_current(stream)
        others = threads.alive()
        before = issued_collectives()
        try:
            if frame.flags & PROBE:
                self._outbox.answer(run_probe(handler), stream, context, seq, 0)
            else:
                began = time.monotonic()
                answers = collect(handler.handle(data, context), stream)
                if self._overlap is not None:
                    self._overlap.handled()
                if stream.at_end is not None:
                    stream.at_end()
                self._outbox.answer(answers, stream, context, seq, count, time.monotonic() - began)
        except Refused as refusal:
            self._outbox.refused(refusal, seq)
        except (Exception, Cancelled) as error:
            issued = issued_collectives() - before - stream.apart
            if stream.at_end is not None:
                stream.at_end()
            stream.end()
            failure = self._failure(error, stream, issued)
            if stream.cancelled:  # every rank leaves at the same step; what its threads are still at comes first
                threads.wait_for_end(others)
            self._outbox.failed(failure, seq)
            streaming.set_current(None)
            self._wait_for_continue(seq)
            return
        streaming.set_current(None)
        if stream.cancelled:
            threads.wait_for_end(others)

    # ── failures ──

    def _wait_for_continue(self, seq: int) -> None:
        if self._overlap is not None:
            self._overlap.leave_failed(seq)
        else:
            self._inbox.wait_for_continue(seq)

    def _failure(self, error: BaseException, stream: Stream, issued: int) -> Failure:
        """What to report of an exception that has left a handler.

        Raises:
            Disconnected, WireError: nothing; it came from the link, or the worker ends.
        """
        if self._inbox.broken is not None:
            raise self._inbox.broken from None
        if isinstance(error, Cancelled):
            if stream.cancelled:
                everyone = tuple(range(self._together))
                return Failure("cancelled", "", "every client has left", "", "", self._rank, everyone)
            if self._inbox.stopping:
                raise Disconnected from None
            # Kept by the handler from an earlier batch, for this one's clients are there. An error like any other.
        return describe(error, self._rank, self._together, issued)

    def _stop(self, reason: str) -> int:
        print(f"minserve: rank {self._rank} stops: {reason}", file=sys.stderr, flush=True)
        return 1


def collect(answers: object, stream: Stream) -> object:
    """What a call of `handle` comes to: a coroutine is run, what a generator yields is sent."""
    if isinstance(answers, list) or answers is None:  # at once what is the rule, and on all ranks but the first
        return answers
    answers = coroutines.complete(answers)
    if inspect.isasyncgen(answers):
        return coroutines.complete_stream(answers, stream)
    return yield_all(answers, stream) if inspect.isgenerator(answers) else answers


def yield_all(answers: Generator[object, Any, object], stream: Stream) -> object:
    """Sends what a generator yields, a step each; what it returns in the end is its last chunk, if anything."""
    try:
        while True:
            try:
                stream.send(next(answers))
            except StopIteration as end:
                return end.value if end.value is not None else [b""] * stream.count
    finally:
        answers.close()  # after a cancel: its own clean-up runs now, not when it is collected
