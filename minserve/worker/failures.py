"""Exceptions on the ranks: which leave them in step, so that the worker goes on, and which end it.

A rank that raised goes no further until it gets CONTINUE, which is sent only when all ranks have left the batch with the
same error. An exception on some ranks ends the worker: its ranks are no longer at the same place.

In a pipeline a failure goes on to the later stages, and to the first. Those in front of the one that failed may have left
the batch before, with their part done. So it is over when all have left it, in either way; its clients do not wait for that.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from minserve.dispatch.clock import Alarm
from minserve.errors import HandlerError, HandlerOutOfMemory, WireError
from minserve.telemetry.events import EventKind
from minserve.wire.frames import Kind, header
from minserve.worker.blame import Cause, What, culprit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from minserve.dispatch.clock import Clock
    from minserve.wire.messages import Failure
    from minserve.worker.outstanding import Limits, Outstanding, RankLink

logger = logging.getLogger(__name__)

LOOK_S = 0.01  # how often it is looked whether ranks that report nothing have come to the end of a batch


class Failures:
    """Judges what the ranks of one worker report of their batches.

    Args:
        outstanding: the batches under way, by seq, oldest first.
        behind: whether a rank is still at work on an earlier batch: rank, seq → it is.
        left: whether a rank is through with a batch: rank, seq → it is.
        on_over: a batch is over, some time after its last report.
        who, on_broken, on_event: see `Broadcast`.

    Attributes:
        causes: exceptions of the batches that are in doubt. While there are any, no new batch may go out.
    """

    def __init__(
        self,
        clock: Clock,
        links: Sequence[RankLink],
        limits: Limits,
        who: str,
        outstanding: Mapping[int, Outstanding],
        behind: Callable[[int, int], bool],
        left: Callable[[int, int], bool],
        on_over: Callable[[Outstanding], None],
        on_broken: Callable[[Cause, int], None],
        on_event: Callable[[EventKind, str, int, int], None],
    ) -> None:
        self._clock = clock
        self._links = links
        self._limits = limits
        self._who = who
        self._outstanding = outstanding
        self._behind = behind
        self._left = left
        self._on_over = on_over
        self._on_broken = on_broken
        self._on_event = on_event
        self._alarm = Alarm(clock, self._look)
        self.causes: list[Cause] = []

    def stop(self) -> None:
        """The group is gone: nothing is in doubt any more."""
        self._alarm.stop()

    def report(self, link: RankLink, batch: Outstanding, failure: Failure) -> bool:
        """Takes a rank's ERROR about a batch under way. Returns whether the batch is over with it.

        Raises:
            WireError: this rank may not say so.
        """
        self._check(link, failure)
        if failure.kind == "cancelled":
            return self._left_its_stream(link, batch, failure)
        self._log(link, batch.seq, failure)
        if failure.kind == "refused":  # by minserve, after handle returned: every rank is in step
            self._answer_failed(batch, link, failure)
            return True
        if failure.kind == "chunk":  # the stream goes on until it is cancelled, so that the ranks stay in step
            self._answer_failed(batch, link, failure)
            return False
        batch.failures[link.rank] = failure
        in_pipeline = len(failure.needs) < len(self._links)
        raised = self._links[failure.origin] if in_pipeline else link
        batch.causes.append(_cause(raised, failure, self._clock.time(), probe=not batch.requests))
        self.causes.append(batch.causes[-1])
        if _in_step(batch, failure) and batch.requests:
            if batch.leaving is None:
                batch.leaving = batch.failures[min(batch.failures)]  # the same whichever rank's report came last
                self._answer_failed(batch, self._links[batch.leaving.origin], batch.leaving)
            if self._all_have_left(batch):
                self._let_continue(batch)
                return True
            self._doubt(batch)
        elif len(batch.failures) == len(self._links) or batch.leaving is not None:
            self.out_of_step(batch)
        elif not self._passed_on(batch):
            self._doubt(batch)
        return False

    def late(self, link: RankLink, seq: int, failure: Failure) -> None:
        """Takes a rank's ERROR about a batch that rank 0 has ended."""
        self._log(link, seq, failure)
        self.causes.append(_cause(link, failure, self._clock.time()))
        self._break()

    def out_of_step(self, batch: Outstanding) -> None:
        """The ranks are not at the same place: nothing that they send is to be trusted."""
        self.causes += [cause for cause in batch.causes if cause not in self.causes]
        self._break()

    def _all_have_left(self, batch: Outstanding) -> bool:
        there = batch.failures.keys() | batch.done
        return all(link.rank in there or self._left(link.rank, batch.seq) for link in self._links)

    def _left_its_stream(self, link: RankLink, batch: Outstanding, failure: Failure) -> bool:
        """A rank has come to where its stream was cancelled. Others may be steps behind; the batch's own limit governs."""
        if not batch.cancelled:
            raise WireError(f"ERROR says that the stream of batch {batch.seq} was cancelled, which it was not")
        batch.failures[link.rank] = failure
        batch.causes.append(_cause(link, failure, self._clock.time()))
        if batch.leaving is not None:  # it has come to the end of what was granted before it could hear of the failure
            over = self._all_have_left(batch)
        elif len(batch.failures) < len(self._links):
            return False
        else:
            over = _in_step(batch, failure)
        if over:
            self._let_continue(batch)
        elif batch.leaving is None:
            self.out_of_step(batch)
        return over

    def _let_continue(self, batch: Outstanding) -> None:
        """Every rank has left the batch at the same place: they may go on."""
        # With a pipeline another rank may be a batch ahead and have raised there: that one stays in doubt.
        self.causes = [cause for cause in self.causes if cause not in batch.causes]
        for link in self._links:
            link.write([header(Kind.CONTINUE, batch.seq, 0, 0)])

    def _check(self, link: RankLink, failure: Failure) -> None:
        if not 0 <= failure.origin < len(self._links):
            raise WireError(f"ERROR of rank {failure.origin}, of which there are {len(self._links)}")
        if failure.kind in ("refused", "chunk") and link.rank != 0:
            raise WireError(f"ERROR about an answer from rank {link.rank}: only rank 0 answers")

    def _passed_on(self, batch: Outstanding) -> bool:
        """Whether a pipeline carries the failure to its first stage, which may be at another batch's work meanwhile."""
        kinds = {(report.kind, report.type_name, report.place, report.needs) for report in batch.failures.values()}
        ((kind, _, _, needs), *others) = kinds
        there = batch.failures.keys() & set(needs)  # the ranks of the first stage take the same turns
        return kind == "own" and not others and not there and len(needs) < len(self._links)

    def _doubt(self, batch: Outstanding) -> None:
        """The ranks that have not reported have errorGrace to say the same, or where that is enough, to leave the batch."""
        batch.doubted_until = min(batch.doubted_until, self._clock.time() + self._limits.error_grace)
        self._look_again(batch)

    def _look_again(self, batch: Outstanding) -> None:
        soon = self._clock.time() + LOOK_S if batch.leaving is not None else math.inf
        self._alarm.at(min(batch.doubted_until, soon))

    def _look(self) -> None:
        now = self._clock.time()
        for batch in list(self._outstanding.values()):
            if batch.leaving is not None and self._all_have_left(batch):
                self._let_continue(batch)
                self._on_over(batch)
                continue
            if batch.doubted_until <= now:
                if not any(self._behind(link.rank, batch.seq) for link in self._links):
                    self._break()
                    return
                # It may come to say the same. The batch that it is at has a limit of its own.
                batch.doubted_until = now + self._limits.error_grace
            self._look_again(batch)

    def _break(self) -> None:
        self._alarm.stop()  # until the group has ended nobody is told to go on
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


def _in_step(batch: Outstanding, failure: Failure) -> bool:
    """Whether every rank that must report has reported this same failure, and the group can go on after it."""
    if any(report.kind in ("collective", "device") for report in batch.failures.values()):
        return False
    # Of the ranks that need not report it one may have come to where the stream was cancelled: it has left, too.
    reports = [report for rank, report in batch.failures.items() if rank in failure.needs or report.kind != "cancelled"]
    # The same line may be in a loop with a collective: the ranks are in step only if they went round as often.
    kinds = {(report.type_name, report.place, report.collectives) for report in reports}
    return len(kinds) == 1 and batch.failures.keys() >= set(failure.needs)


def _cause(link: RankLink, failure: Failure, now: float, probe: bool = False) -> Cause:
    what = What.PROBE if probe else What.EXCEPTION
    if failure.kind == "collective":
        what = What.COLLECTIVE
    text = f"raised {failure.type_name}: {failure.text}"
    if failure.kind == "cancelled":
        text = "was at another step than other ranks when the stream was cancelled"
    return Cause(what, link.rank, link.pid, f"{text} in its probe" if probe else text, now)
