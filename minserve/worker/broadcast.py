"""The one owner of order in a worker: it numbers the batches, sends each to every rank, and matches what comes back.

Every rank must see the same batches in the same order, or the collectives inside the handlers pair up wrong and answers get
mixed. Two rules make that a property of this file:

* `send` gives a batch its seq and writes it to all links (`fanout`) in one callback, with no await in between.
* Before that, `has_place` has seen room on every link, so all ranks get the batch or none does.

What an exception on a rank means for the others is judged in `failures`, how long all of it may take in `time_limits`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from minserve.errors import BadRequest, MinServeError, ResponseTimeout, WireError
from minserve.telemetry.events import EventKind
from minserve.telemetry.meters import unwatched
from minserve.wire.frames import MAX_META_BYTES, PROBE, SMALL_BYTES, Kind
from minserve.wire.messages import Answers, Failure, new_batch, pack, pack_with_body, unpack
from minserve.worker.blame import Cause, culprit
from minserve.worker.failures import Failures
from minserve.worker.fanout import Fanout
from minserve.worker.memory import place_bodies
from minserve.worker.outstanding import Outstanding
from minserve.worker.places import Places
from minserve.worker.replies import answers_of, whole_answers
from minserve.worker.streams import Streams
from minserve.worker.time_limits import TimeLimits
from minserve.worker.timing import Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from minserve.dispatch.clock import Clock
    from minserve.dispatch.request import Request
    from minserve.telemetry.meters import ModelMeters
    from minserve.wire.arena import Segment
    from minserve.wire.frames import Frame
    from minserve.wire.messages import Answer, Buffer
    from minserve.worker.memory import Memory
    from minserve.worker.outstanding import Limits, RankLink
    from minserve.worker.recorder import Recorder

_ANSWERS = frozenset({Kind.REPLY, Kind.CHUNK})  # told by one look-up: each `Kind.X` costs as much as a call


class Broadcast:
    """Sends batches to all ranks of one worker and relays rank 0's answers.

    Args:
        links: one per rank, in rank order.
        limits: see `Limits`.
        who: "model/worker" for messages.
        steps: how many steps of a stream a rank has counted in a batch: rank, seq → number.
        on_free: a place has come free.
        on_broken: the group cannot go on; the cause is the one found among this file's causes. Of a `SILENCE` the rank is a
            guess, and `seq` the batch that does not end.
        on_lost: the worker has failed with these requests in flight; whether a rank had begun with them.
        on_event: something that costs no restart but that an operator wants to know: kind, detail, rank, pid.
        meters: of the model version.
        behind: whether a rank is still at work on an earlier batch: rank, seq → it is.
        left: whether a rank is through with a batch: rank, seq → it is.
        memory: shared with the ranks, for large bodies.

    Attributes:
        batches_done: without probes.
        first_seq: of the first batch that is no probe; 0 before it.
        recorder: told of each batch as it goes out, and how it ended; None as long as nobody asks for a recording.
        replied: seq of the last batch that is over with all those before it.
    """

    def __init__(
        self,
        clock: Clock,
        links: Sequence[RankLink],
        limits: Limits,
        who: str,
        steps: Callable[[int, int], int],
        on_free: Callable[[], None],
        on_broken: Callable[[Cause, int], None],
        on_lost: Callable[[list[Request], MinServeError, bool], None],
        on_event: Callable[[EventKind, str, int, int], None],
        meters: ModelMeters | None = None,
        behind: Callable[[int, int], bool] = lambda rank, seq: False,
        left: Callable[[int, int], bool] = lambda rank, seq: False,
        memory: Memory | None = None,
    ) -> None:
        self._clock = clock
        self._meters = unwatched() if meters is None else meters
        self._links = links
        self._limits = limits
        self._who = who
        self._on_free = on_free
        self._on_broken = on_broken
        self._on_lost = on_lost
        self._on_event = on_event
        self._memory = memory
        self._seq = 0
        self._outstanding: dict[int, Outstanding] = {}
        # By seq: where the streams stood before the chunks that are just being taken.
        self._stepped: dict[int, int] = {}
        self._fanout = Fanout(clock, links)
        self._ended = False
        self._streams = Streams(links, limits, steps)
        self._timing = Timing(self._meters)
        self._places = Places(clock, limits.in_flight)
        self._time = TimeLimits(clock, links, limits, self._outstanding, self._silent, self._overdue)
        self._failures = Failures(
            *(clock, links, limits, who, self._outstanding, behind, left, self._finish, on_broken, on_event)
        )
        self.batches_done = 0
        self.first_seq = 0
        self.recorder: Recorder | None = None
        self.replied = 0

    # ── to the ranks ──

    def has_place(self, *, full: bool = True, ahead: int = 0) -> bool:
        """Whether a batch may go now. With a slow link the answer is no, and only this worker waits for it.

        Args:
            full: it has as many requests as a batch may have.
            ahead: asks for the time when so many more have been sent.
        """
        if self._ended or self._fanout.crowded or self._failures.causes:
            return False
        return self._places.allow(len(self._outstanding) + ahead, full=full)

    def set_places(self, places: int) -> None:
        """The ranks have said how many batches they can have at work at once."""
        self._places.fix(places)

    @property
    def under_way(self) -> int:
        """How many batches and probes are."""
        return len(self._outstanding)

    @property
    def batch_seconds(self) -> float | None:
        """How long one usually takes; None before the first."""
        return self._timing.batch_seconds

    def room_changed(self) -> None:
        """A link has come to have no room for another batch, or has room again."""
        self._fanout.look()
        self._time.crowded(self._fanout.crowded)
        if not self._fanout.crowded:
            self._on_free()

    def send(self, requests: list[Request]) -> None:
        """Broadcasts one batch."""
        began = self._meters.now()
        meta = new_batch([request.meta for request in requests], self._streams.first)
        bodies: list[Buffer] = []
        shared = False
        for request in requests:
            bodies += request.bodies
            shared = shared or request.segments is not None
            request.worker = self._who
        segments: Sequence[Segment] = ()
        if shared:
            bodies, meta.shared, segments = place_bodies(self._memory, requests)
        pieces = pack_with_body(Kind.BATCH, meta, bodies, self._seq + 1)
        if len(pieces[0]) > MAX_META_BYTES:  # its ranks would take it for rubbish, and the worker would be lost
            raise BadRequest(
                f"the headers and names of a batch's {len(requests)} requests are over {MAX_META_BYTES} bytes"
            )
        small = sum(map(len, pieces)) <= SMALL_BYTES
        if small:
            pieces = [b"".join(pieces)]
        if self._memory is not None:
            self._memory.lend(segments)
        # Only now: a batch that cannot be encoded must not leave a gap in the numbers.
        batch = self._write(pieces, requests, later=small and bool(self._outstanding))
        self.first_seq = self.first_seq or self._seq
        self._timing.sent(batch, began)
        if self.recorder is not None:
            self.recorder.batch(self._seq, requests)

    def probe(self, on_passed: Callable[[], None] | None = None) -> None:
        """Sends the handler's probe through all ranks: a batch without requests.

        Args:
            on_passed: called when every rank has passed it.
        """
        self._write([pack(Kind.BATCH, new_batch(()), self._seq + 1, PROBE)], []).on_passed = on_passed

    def _write(self, pieces: Sequence[Buffer], requests: list[Request], *, later: bool = False) -> Outstanding:
        """Gives a batch its number and writes it to all links."""
        self._seq += 1
        self._fanout.write(pieces, later=later)
        batch = Outstanding(self._seq, requests, granted=self._streams.first)
        self._time.begin(batch)
        if not self._outstanding:
            self._places.began()
        self._outstanding[self._seq] = batch
        return batch

    @property
    def causes(self) -> list[Cause]:
        """Exceptions of the batches that are in doubt."""
        return self._failures.causes

    @property
    def busy(self) -> bool:
        """Whether a batch or a probe is under way."""
        return bool(self._outstanding)

    @property
    def working(self) -> bool:
        """Whether a batch is under way that somebody has asked for."""
        return any(batch.requests for batch in self._outstanding.values())

    def fail_all(self, error: MinServeError, begun: int) -> None:
        """The group is gone: hands back the requests of the batches that its ranks had begun.

        Args:
            begun: seq of the last batch that a rank has taken up. The oldest counts as begun in any case: its very bytes may
                be what no rank survives.
        """
        if self._outstanding and not self._ended:
            begun = max(begun, next(iter(self._outstanding)))
        self._ended = True
        self._time.stop()
        self._failures.stop()
        self._lose([batch for batch in self._outstanding.values() if batch.seq <= begun], error, begun=True)

    def fail_rest(self, error: MinServeError, begun: int) -> None:
        """The ranks' processes are gone, too: what none of them has begun by now, none ever will."""
        self.fail_all(error, begun)
        self._lose(list(self._outstanding.values()), error, begun=False)

    def _lose(self, batches: list[Outstanding], error: MinServeError, *, begun: bool) -> None:
        for batch in batches:
            del self._outstanding[batch.seq]
            if self.recorder is not None:
                self.recorder.ended(batch.seq, str(error))
        requests = [request for batch in batches for request in batch.requests]
        if requests:
            self._on_lost(requests, error, begun)

    def look(self) -> None:
        """Twice a second: finds clients that left before the first chunk, and ranks that were not ready for a cancel.

        Also the time to give shared memory back that has not been used for long.
        """
        if self._memory is not None:
            self._memory.requests.rest(self._clock.time())
        for batch in list(self._outstanding.values()):
            if batch.requests and not batch.leaving and all(request.left for request in batch.requests):
                self._let_go(batch)

    def _let_go(self, batch: Outstanding) -> None:
        """Nobody waits for this batch any more: it is cancelled where that is possible."""
        before = batch.cancelled
        self._streams.govern(batch)
        if batch.cancelled and not before:
            (self._time.cancelled if self._limits.any_order else self._time.stepped)(batch)

    # ── from a rank ──

    def received(self, link: RankLink, frame: Frame) -> None:
        """Takes a REPLY, CHUNK, ERROR or DONE.

        Raises:
            WireError: the frame is not about a batch under way, or this rank may not send it.
        """
        if self._ended:
            return
        batch = self._outstanding.get(frame.seq)
        if batch is None:
            if 0 < frame.seq <= self._seq:
                if frame.kind is Kind.ERROR:
                    self._failures.late(link, frame.seq, unpack(Failure, frame.meta))
                    return
                if frame.kind is Kind.DONE and self._limits.reply_after_all:
                    return  # rank 0 alone has ended the batch: its answer was refused
            raise WireError(f"{frame.kind.name} for batch {frame.seq}, which is not under way (last sent: {self._seq})")
        if frame.kind not in _ANSWERS:
            if frame.kind is Kind.ERROR:
                self._failed(link, batch, unpack(Failure, frame.meta))
            else:
                self._done(link, batch)
        elif link.rank != 0:
            raise WireError(f"{frame.kind.name} from rank {link.rank}: only rank 0 answers")
        elif frame.kind is Kind.CHUNK:
            self._chunk(batch, frame)
        elif self._limits.reply_after_all or not batch.requests:  # a probe is over when all ranks are through
            batch.held = whole_answers(batch, frame, self._memory)  # looked at now, while it is clear whose it is
            self._done(link, batch)
        else:
            self._reply(batch, whole_answers(batch, frame, self._memory))

    def _reply(self, batch: Outstanding, answers: list[tuple[Answer, Buffer]]) -> None:
        if batch.failures:  # another rank has raised, or was cancelled
            self._failures.out_of_step(batch)
            return
        replied = self._meters.now()
        pairs = zip(batch.requests, answers, strict=True)
        answered = [request for request, (answer, body) in pairs if request.answer(answer, body)]
        if batch.requests:
            self._timing.answered(batch, answered, replied)
        self._finish(batch)

    def _chunk(self, batch: Outstanding, frame: Frame) -> None:
        meta = unpack(Answers, frame.meta)
        if not batch.step < meta.step <= batch.granted:
            raise WireError(f"CHUNK of step {meta.step} behind step {batch.step}, with {batch.granted} granted")
        if meta.shared or batch.seq not in self._stepped:  # see `Streams`
            self._stepped[batch.seq] = batch.step
        batch.step = meta.step
        # Also if they are for nobody: rank 0 wants its memory back.
        answers = answers_of(batch, meta, frame, self._memory)
        if batch.failures:
            return  # nor is this chunk; whether the failure is in step is still open
        if batch.on_change is None:
            batch.on_change = functools.partial(self._clients_changed, batch)
        for answer, body in answers:
            batch.requests[answer.index].chunk(answer, body, self._limits.stream_buffer, batch.on_change)

    def taken(self) -> None:
        """All that one read of rank 0's link gave has been taken: the streams in it have gone on."""
        if not self._stepped:
            return
        stepped, self._stepped = self._stepped, {}
        for seq, before in stepped.items():
            batch = self._outstanding.get(seq)
            if batch is not None and not batch.failures:
                batch.burst = batch.step - before
                batch.limit = self._limits.response_timeout
                self._clients_changed(batch)

    def _clients_changed(self, batch: Outstanding) -> None:
        """A client has more or less to read, or has left: the ranks may go on, or must wait, and the clock with them."""
        if batch.seq not in self._outstanding or batch.leaving is not None:  # its clients have had their error
            return
        self._streams.govern(batch)
        self._time.stepped(batch)

    def _failed(self, link: RankLink, batch: Outstanding, failure: Failure) -> None:
        if self._failures.report(link, batch, failure):
            self._finish(batch)
        elif batch.leaving is not None:
            self._streams.let_go_on(batch)
        elif failure.kind == "chunk":  # its clients have had their answer, and wait for nothing more
            self._clients_changed(batch)

    def _done(self, link: RankLink, batch: Outstanding) -> None:
        batch.done.add(link.rank)
        if len(batch.done) == len(self._links) and batch.held is not None:
            self._reply(batch, batch.held)

    def _finish(self, batch: Outstanding) -> None:
        del self._outstanding[batch.seq]
        if self.recorder is not None:
            self.recorder.ended(batch.seq, batch.error)
        if batch.cancelled:
            detail = f"{self._who}: every client of the stream in batch {batch.seq} has left; it was told to end"
            detail += "" if self._limits.any_order else f" behind step {batch.granted}"
            self._on_event(EventKind.STREAM_CANCELLED, detail, 0, self._links[0].pid)
        if batch.on_passed is not None:
            batch.on_passed()
        self.replied = next(iter(self._outstanding), self._seq + 1) - 1
        self.batches_done += bool(batch.requests)
        self._places.finished(batch.seconds if batch.requests else None)
        self._time.finished(batch)
        self._on_free()

    # ── time ──

    def _silent(self, cause: Cause, seq: int) -> None:
        self._on_broken(culprit([*self._failures.causes, cause]), seq or self._seq)

    def _overdue(self, batch: Outstanding) -> None:
        """One of several requests under way takes too long: that is its own affair, as long as its task can be ended."""
        what = f"batch {batch.seq} was not finished within {batch.limit:g} s and is cancelled"
        for request in batch.requests:
            request.fail(ResponseTimeout(f"{self._who}: {what}"))
        self._let_go(batch)
