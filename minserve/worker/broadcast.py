"""The one owner of order in a worker: it numbers the batches, sends each to every rank, and matches what comes back.

Every rank must see the same batches in the same order, or the collectives inside the handlers pair up wrong and answers get
mixed. Three rules make that a property of this file:

* `send` gives a batch its seq and writes it to all links in one callback, with no await in between.
* Before that, `has_place` has seen room on every link, so all ranks get the batch or none does.
* A rank that raised goes no further until it gets CONTINUE, which is sent only when all ranks have left the batch with the
  same error. An exception on some ranks ends the worker: its ranks are no longer at the same place.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import deque
from typing import TYPE_CHECKING

from minserve.dispatch.clock import Alarm
from minserve.dispatch.dispatcher import DESCRIBE
from minserve.errors import BadRequest, HandlerError, HandlerOutOfMemory, MinServeError, ResponseTimeout, WireError
from minserve.telemetry.events import EventKind
from minserve.telemetry.meters import unwatched
from minserve.wire.frames import MAX_META_BYTES, PROBE, Kind, header
from minserve.wire.messages import Answers, Batch, Failure, pack, pack_with_body, split_body, unpack
from minserve.worker.blame import Cause, What, culprit
from minserve.worker.outstanding import Outstanding
from minserve.worker.streams import Streams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from minserve.dispatch.clock import Clock
    from minserve.dispatch.request import Request
    from minserve.telemetry.meters import ModelMeters
    from minserve.wire.frames import Frame
    from minserve.wire.messages import Answer, Buffer
    from minserve.worker.outstanding import Limits, RankLink
    from minserve.worker.recorder import Recorder

logger = logging.getLogger(__name__)

# Up to here one copy of the whole frame costs less than handing its pieces to every link.
SMALL_BYTES = 16 * 1024


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
        on_lost: the worker has failed with these requests in flight.
        on_event: something that costs no restart but that an operator wants to know: kind, detail, rank, pid.
        meters: of the model version.

    Attributes:
        batches_done: without probes.
        first_seq: of the first batch that is no probe; 0 before it.
        recorder: told of each batch as it goes out, and how it ended; None as long as nobody asks for a recording.
        replied: seq of the last batch that rank 0 is through with.
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
        on_lost: Callable[[list[Request], MinServeError], None],
        on_event: Callable[[EventKind, str, int, int], None],
        meters: ModelMeters | None = None,
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
        self._seq = 0
        self._outstanding: dict[int, Outstanding] = {}
        self._streams = Streams(links, limits, steps)
        self._due_alarm = Alarm(clock, self._look_at_due)
        self._grace_alarm = Alarm(clock, self._grace_over)
        # Exceptions of the batches that are in doubt. While there are any, no new batch goes out.
        self.causes: list[Cause] = []
        # Seq, type and place of the latest failures in step: a rank's report of one may come after its batch is over.
        self._continued: deque[tuple[int, str, str]] = deque(maxlen=64)
        self._crowded_until = math.inf  # how long it is borne that a link has no room
        self.batches_done = 0
        self.first_seq = 0
        self.recorder: Recorder | None = None
        self.replied = 0

    # ── to the ranks ──

    def has_place(self) -> bool:
        """Whether a batch may go now. With a slow link the answer is no, and only this worker waits for it."""
        if len(self._outstanding) >= self._limits.in_flight or self.causes:
            return False
        return all(link.has_room for link in self._links)

    def room_changed(self) -> None:
        """A link has come to have no room for another batch, or has room again."""
        if all(link.has_room for link in self._links):
            self._crowded_until = math.inf
            self._on_free()
        elif self._crowded_until == math.inf:
            self._crowded_until = self._clock.time() + self._limits.response_timeout
            self._due_alarm.at(self._crowded_until)

    def send(self, requests: list[Request]) -> None:
        """Broadcasts one batch."""
        began = self._meters.now()
        meta = Batch(tuple(request.meta for request in requests), self._limits.stream_ahead)
        bodies = [body for request in requests for body in request.bodies]
        pieces = pack_with_body(Kind.BATCH, meta, bodies, self._seq + 1)
        if len(pieces[0]) > MAX_META_BYTES:  # its ranks would take it for rubbish, and the worker would be lost
            raise BadRequest(
                f"the headers and names of a batch's {len(requests)} requests are over {MAX_META_BYTES} bytes"
            )
        if sum(map(len, pieces)) <= SMALL_BYTES:
            pieces = [b"".join(pieces)]
        for request in requests:
            request.worker = self._who
        self._write(pieces, requests)  # only now: a batch that cannot be encoded must not leave a gap in the numbers
        self.first_seq = self.first_seq or self._seq
        batch, written = self._outstanding[self._seq], self._meters.now()
        batch.began, batch.written = began, written
        self._meters.batch_sent(len(requests), began, written)
        if self.recorder is not None:
            self.recorder.batch(self._seq, requests)

    def probe(self, on_passed: Callable[[], None] | None = None) -> None:
        """Sends the handler's probe through all ranks: a batch without requests.

        Args:
            on_passed: called when every rank has passed it.
        """
        self._write([pack(Kind.BATCH, Batch(()), self._seq + 1, PROBE)], [])
        self._outstanding[self._seq].on_passed = on_passed

    def _write(self, pieces: Sequence[Buffer], requests: list[Request]) -> None:
        self._seq += 1
        for link in self._links:  # no await here, ever: this loop is what makes the order common to all ranks
            link.write(pieces)
        limit = self._limit()
        # A batch behind others counts from when it becomes the oldest, see _finish.
        due = self._clock.time() + limit if not self._outstanding or self._limits.any_order else math.inf
        self._outstanding[self._seq] = Outstanding(self._seq, requests, limit, due, self._limits.stream_ahead)
        self._due_alarm.at(due)

    def _limit(self) -> float:
        return self._limits.response_timeout if self.batches_done else self._limits.first_batch_timeout

    @property
    def busy(self) -> bool:
        """Whether a batch or a probe is under way."""
        return bool(self._outstanding)

    @property
    def working(self) -> bool:
        """Whether a batch is under way that somebody has asked for."""
        return any(batch.requests for batch in self._outstanding.values())

    def fail_all(self, error: MinServeError) -> None:
        """Hands back every request in flight; the group is gone."""
        self._due_alarm.stop()
        self._grace_alarm.stop()
        outstanding, self._outstanding = self._outstanding, {}
        if self.recorder is not None:
            for seq in outstanding:
                self.recorder.ended(seq, str(error))
        requests = [request for batch in outstanding.values() for request in batch.requests]
        if requests:
            self._on_lost(requests, error)

    def look(self) -> None:
        """Twice a second: finds clients that left before the first chunk, and ranks that were not ready for a cancel."""
        for batch in list(self._outstanding.values()):
            if batch.requests and all(request.left for request in batch.requests):
                self._let_go(batch)

    def _let_go(self, batch: Outstanding) -> None:
        """Nobody waits for this batch any more: it is cancelled where that is possible."""
        before = batch.cancelled
        self._streams.govern(batch)
        if self._limits.any_order and batch.cancelled and not before:
            batch.due = self._clock.time() + self._limits.response_timeout  # by then its task must have ended
            self._due_alarm.at(batch.due)

    # ── from a rank ──

    def received(self, link: RankLink, frame: Frame) -> None:
        """Takes a REPLY, CHUNK, ERROR or DONE.

        Raises:
            WireError: the frame is not about a batch under way, or this rank may not send it.
        """
        batch = self._outstanding.get(frame.seq)
        if batch is None:
            if 0 < frame.seq <= self._seq:
                if frame.kind is Kind.ERROR:
                    self._failed_late(link, frame.seq, unpack(Failure, frame.meta))
                    return
                if frame.kind is Kind.DONE and self._limits.reply_after_all:
                    return  # rank 0 alone has ended the batch: its answer was refused, or a pipeline passed a failure on
            raise WireError(f"{frame.kind.name} for batch {frame.seq}, which is not under way (last sent: {self._seq})")
        if frame.kind is Kind.ERROR:
            self._failed(link, batch, self._checked(link, unpack(Failure, frame.meta)))
        elif frame.kind is Kind.DONE:
            self._done(link, batch)
        elif link.rank != 0:
            raise WireError(f"{frame.kind.name} from rank {link.rank}: only rank 0 answers")
        elif frame.kind is Kind.CHUNK:
            self._chunk(batch, frame)
        elif self._limits.reply_after_all or not batch.requests:  # a probe is over when all ranks are through
            batch.held = self._whole_answers(batch, frame)  # looked at now, while it is clear whose it is
            self._done(link, batch)
        else:
            self._reply(batch, self._whole_answers(batch, frame))

    def _whole_answers(self, batch: Outstanding, frame: Frame) -> list[tuple[Answer, Buffer]]:
        meta = unpack(Answers, frame.meta)
        answers = self._answers(batch, meta.answers, frame)
        if len(answers) != len(batch.requests):
            raise WireError(f"REPLY with {len(answers)} answers to a batch of {len(batch.requests)}")
        batch.seconds = meta.seconds
        return answers

    def _reply(self, batch: Outstanding, answers: list[tuple[Answer, Buffer]]) -> None:
        if batch.failures:  # another rank has raised, or was cancelled
            self._out_of_step(batch)
            return
        meters, replied = self._meters, self._meters.now()
        counts = bool(batch.requests) and batch.requests[0].meta.operation != DESCRIBE  # which travels alone
        for request, (answer, body) in zip(batch.requests, answers, strict=True):
            if request.answer(answer, body) and counts:
                meters.answered(request.named, request.entered, request.sent, replied)
        if batch.requests:
            overhead = batch.written - batch.began + meters.now() - replied
            meters.batch_answered(len(batch.requests), batch.written, replied, overhead)
            meters.handled(batch.seconds, [request.meta.id for request in batch.requests])
        self._finish(batch)

    def _chunk(self, batch: Outstanding, frame: Frame) -> None:
        meta = unpack(Answers, frame.meta)
        if not batch.step < meta.step <= batch.granted:
            raise WireError(f"CHUNK of step {meta.step} behind step {batch.step}, with {batch.granted} granted")
        batch.step = meta.step
        if batch.failures:
            return  # nor is this chunk; whether the failure is in step is still open
        if batch.on_change is None:
            batch.on_change = functools.partial(self._clients_changed, batch)
        for answer, body in self._answers(batch, meta.answers, frame):
            batch.requests[answer.index].chunk(answer, body, self._limits.stream_buffer, batch.on_change)
        batch.limit = self._limits.response_timeout
        self._clients_changed(batch)

    def _clients_changed(self, batch: Outstanding) -> None:
        """A client has more or less to read, or has left: the ranks may go on, or must wait, and the clock with them."""
        if batch.seq not in self._outstanding:
            return
        self._streams.govern(batch)
        waits = batch.waits_for_grant and not batch.cancelled
        batch.due = math.inf if waits else self._clock.time() + batch.limit
        self._due_alarm.at(batch.due)

    def _answers(self, batch: Outstanding, answers: tuple[Answer, ...], frame: Frame) -> list[tuple[Answer, Buffer]]:
        if len(answers) == 1 and answers[0].index == 0 and answers[0].length == len(frame.body):
            return [(answers[0], frame.body)]  # the usual case without batching
        indexes = [answer.index for answer in answers]
        if indexes != sorted(set(indexes)) or (indexes and not 0 <= indexes[0] <= indexes[-1] < len(batch.requests)):
            raise WireError(f"{frame.kind.name} answers requests {indexes} of a batch of {len(batch.requests)}")
        return list(zip(answers, split_body(frame.body, (answer.length for answer in answers)), strict=True))

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
        self.replied = max(self.replied, batch.seq)
        self.batches_done += bool(batch.requests)
        if self._outstanding and not self._limits.any_order:
            oldest = next(iter(self._outstanding.values()))
            oldest.limit = self._limit()
            oldest.due = min(oldest.due, self._clock.time() + oldest.limit)
            self._due_alarm.at(oldest.due)
        self._on_free()

    # ── exceptions ──

    def _failed(self, link: RankLink, batch: Outstanding, failure: Failure) -> None:
        if failure.kind == "cancelled":
            self._left_its_stream(link, batch, failure)
            return
        self._log(link, batch.seq, failure)
        if failure.kind == "refused":  # by minserve, after handle returned: every rank is in step
            self._answer_failed(batch, link, failure)
            self._finish(batch)
            return
        if (
            failure.kind == "chunk"
        ):  # the stream goes on for nobody, so that the ranks stay in step, until it is cancelled
            self._answer_failed(batch, link, failure)
            self._clients_changed(batch)
            return
        batch.failures[link.rank] = failure
        batch.causes.append(_cause(link, failure, self._clock.time(), probe=not batch.requests))
        self.causes.append(batch.causes[-1])
        if self._in_step(batch, failure) and batch.requests:
            # With a pipeline another rank may be a batch ahead and have raised there: that one stays in doubt.
            self.causes = [cause for cause in self.causes if cause not in batch.causes]
            if not self.causes:
                self._grace_alarm.stop()
            first = batch.failures[min(batch.failures)]  # the same whichever rank's report came last
            self._let_continue(batch, first)
            self._answer_failed(batch, self._links[first.origin], first)
            self._finish(batch)
        elif len(batch.failures) == len(self._links):
            self._out_of_step(batch)
        else:
            self._grace_alarm.at(self._clock.time() + self._limits.error_grace)

    def _left_its_stream(self, link: RankLink, batch: Outstanding, failure: Failure) -> None:
        """A rank has come to where its stream was cancelled. Others may be steps behind; the batch's own limit governs."""
        if not batch.cancelled:
            raise WireError(f"ERROR says that the stream of batch {batch.seq} was cancelled, which it was not")
        batch.failures[link.rank] = failure
        batch.causes.append(_cause(link, failure, self._clock.time()))
        if len(batch.failures) < len(self._links):
            return
        if self._in_step(batch, failure):
            self._let_continue(batch, failure)
            self._finish(batch)
        else:
            self._out_of_step(batch)

    def _let_continue(self, batch: Outstanding, failure: Failure) -> None:
        """Every rank has left the batch at the same place: they may go on."""
        self._continued.append((batch.seq, failure.type_name, failure.place))
        for link in self._links:
            link.write([header(Kind.CONTINUE, batch.seq, 0, 0)])

    def _out_of_step(self, batch: Outstanding) -> None:
        """The ranks are not at the same place: nothing that they send is to be trusted."""
        self.causes += [cause for cause in batch.causes if cause not in self.causes]
        self._break()

    def _failed_late(self, link: RankLink, seq: int, failure: Failure) -> None:
        """A report on a batch that rank 0 has ended."""
        self._log(link, seq, failure)
        if (seq, failure.type_name, failure.place) not in self._continued:
            self.causes.append(_cause(link, failure, self._clock.time()))
            self._break()

    def _checked(self, link: RankLink, failure: Failure) -> Failure:
        if not 0 <= failure.origin < len(self._links):
            raise WireError(f"ERROR of rank {failure.origin}, of which there are {len(self._links)}")
        if failure.kind in ("refused", "chunk") and link.rank != 0:
            raise WireError(f"ERROR about an answer from rank {link.rank}: only rank 0 answers")
        return failure

    def _in_step(self, batch: Outstanding, failure: Failure) -> bool:
        """Whether every rank that must report has reported this same failure, and the group can go on after it."""
        if any(report.kind in ("collective", "device") for report in batch.failures.values()):
            return False
        # The same line may be in a loop with a collective: the ranks are in step only if they went round as often.
        kinds = {(report.type_name, report.place, report.collectives) for report in batch.failures.values()}
        return len(kinds) == 1 and batch.failures.keys() >= set(failure.needs)

    def _grace_over(self) -> None:
        if self.causes:
            self._break()

    def _break(self) -> None:
        cause = culprit(self.causes)
        silent, seq = self._silent_beside_victims()
        if cause.what is What.COLLECTIVE and silent is not None:
            grace = self._limits.error_grace
            text = f"was still in batch {seq} {grace:g} s after its collective failed on rank {cause.rank}"
            cause = Cause(What.SILENCE, silent.rank, silent.pid, text, self._clock.time())
        self._on_broken(cause, seq)

    def _silent_beside_victims(self) -> tuple[RankLink | None, int]:
        """A rank that has reported nothing about a batch in which others have failed, and that batch."""
        for batch in self._outstanding.values():
            for link in self._links:
                if batch.failures and link.rank not in batch.failures and link.rank not in batch.done:
                    return link, batch.seq
        return None, 0

    def _log(self, link: RankLink, seq: int, failure: Failure) -> None:
        what = f"{failure.type_name or failure.kind}: {failure.text} in batch {seq} {failure.place}"
        logger.error("%s rank %d (pid %d): %s\n%s", self._who, link.rank, link.pid, what, failure.traceback.rstrip())

    def _answer_failed(self, batch: Outstanding, link: RankLink, failure: Failure) -> None:
        who = f"{self._who}, rank {link.rank} (pid {link.pid})"
        what = f"{failure.type_name}: {failure.text}" if failure.type_name else failure.text
        text = f"Prediction failed: {who}: {what}"
        self._on_event(EventKind.HANDLER_ERROR, text, link.rank, link.pid)
        error = HandlerError(text)
        if failure.status:  # the handler speaks to the client in its own words
            error = HandlerError(failure.text)
            error.status = failure.status
        elif failure.kind == "memory":
            error = HandlerOutOfMemory(f"Out of resources: {who}: {what}")
        elif failure.kind == "refused":
            error = HandlerError(f"{failure.text} ({who})")
        for request in batch.requests:
            request.fail(error)
        batch.error = text

    # ── time ──

    def _look_at_due(self) -> None:
        now = self._clock.time()
        if self._crowded_until <= now and self._outstanding:  # rank 0 is at work, too: the batch's own limit governs
            self._crowded_until = now + self._limits.response_timeout
        if self._crowded_until <= now:
            link = next(link for link in self._links if not link.has_room)
            text = f"has taken no batch for {self._limits.response_timeout:g} s"
            self._on_broken(Cause(What.SILENCE, link.rank, link.pid, text, now), self._seq)
            return
        self._due_alarm.at(self._crowded_until)
        for batch in list(self._outstanding.values()):
            if batch.due <= now and self._limits.any_order and batch.requests and not batch.cancelled:
                self._overdue(batch)
            if batch.due <= now:
                self._on_broken(culprit([*self.causes, self._silent(batch, now)]), batch.seq)
                return
            self._due_alarm.at(batch.due)

    def _overdue(self, batch: Outstanding) -> None:
        """One of several requests under way takes too long: that is its own affair, as long as its task can be ended."""
        what = f"batch {batch.seq} was not finished within {batch.limit:g} s and is cancelled"
        for request in batch.requests:
            request.fail(ResponseTimeout(f"{self._who}: {what}"))
        self._let_go(batch)

    def _silent(self, batch: Outstanding, now: float) -> Cause:
        link = self._links[0]
        if batch.held is not None:  # rank 0 has answered; with replyAfter: all it is another that is behind
            link = next(link for link in self._links if link.rank not in batch.done)
        text = f"did not finish batch {batch.seq} within {batch.limit:g} s"
        return Cause(What.SILENCE, link.rank, link.pid, text, now)


def _cause(link: RankLink, failure: Failure, now: float, probe: bool = False) -> Cause:
    what = What.PROBE if probe else What.EXCEPTION
    if failure.kind == "collective":
        what = What.COLLECTIVE
    text = f"raised {failure.type_name}: {failure.text}"
    if failure.kind == "cancelled":
        text = "was at another step than other ranks when the stream was cancelled"
    return Cause(what, link.rank, link.pid, f"{text} in its probe" if probe else text, now)
