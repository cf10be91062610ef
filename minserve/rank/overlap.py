"""Several batches under way on a rank: the first stage of a pipeline begins the next one while the later stages work.

Each batch runs on a thread of its own, which waits inside `Pipeline.run` for its result; `Turns` lets one of them at a time
run the handler's code. A thread that has none takes up the next batch.
"""

from __future__ import annotations

import logging
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minserve.rank import streaming
from minserve.rank.context import BatchContext
from minserve.rank.failures import issued_collectives
from minserve.rank.scratch import Owner, Scratch
from minserve.rank.threads import BATCH_THREAD
from minserve.rank.turns import Turns
from minserve.wire.frames import PROBE, Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from minserve.rank.context import Context
    from minserve.rank.inbox import Inbox
    from minserve.rank.loading import Handler
    from minserve.rank.order import Move, R, Ticket
    from minserve.wire.board import Slot
    from minserve.wire.frames import Frame

logger = logging.getLogger(__name__)


class OutOfOrder(Exception):
    """A batch has come that is not the next one."""


@dataclass(frozen=True)
class Plan:
    """How the model of this rank can have several batches at work.

    Attributes:
        batches: how many: those that are worth while, or that the configuration allows.
        starts_them: this rank is of the first stage; the ranks of the others take one batch after another.
        settings: takes down torch's settings of the thread that calls it, and returns what makes them another one's.
        tell: passes a move on to the other ranks of the first stage; None on all but the first of them, or without any.
        hear: waits for the next move; None on all but those others.
    """

    batches: int
    starts_them: bool
    settings: Callable[[], Callable[[], None]]
    tell: Callable[[Move], None] | None = None
    hear: Callable[[], Move] | None = None


# A rank has one model. Its pipeline is made somewhere in the author's code, and finds the loop here.
_plans: list[Plan] = []
_active: Overlap | None = None


def offer(plan: Plan) -> None:
    """The model that is being loaded can have several batches at work."""
    _plans.append(plan)


def planned() -> Plan | None:
    """The plan of the model; None with several pipelines, whose batches would pass each other."""
    return _plans[0] if len(_plans) == 1 else None


def active() -> Overlap | None:
    """The rank's loop, if it has several batches at work."""
    return _active


class _UnderWay:
    """A batch that has started."""

    def __init__(self, seq: int, context: BatchContext, scratch: Scratch) -> None:
        self.seq = seq
        self.context = context
        self.scratch = scratch
        self.thread = threading.current_thread()
        self.issued = issued_collectives()  # when its turn began, or its last run ended
        self.first_turn = True


class Overlap:
    """Serves the batches of a rank of the first stage.

    Args:
        context: the one that the handler was loaded with.
        run: runs a batch to its end.
    """

    def __init__(
        self,
        inbox: Inbox,
        slot: Slot,
        context: Context,
        handler: Handler,
        plan: Plan,
        run: Callable[[Frame, Context], None],
    ) -> None:
        self._inbox = inbox
        self._slot = slot
        self._context = context
        owners = {id(owner): owner for owner in handler.owners if hasattr(owner, "__dict__")}  # each once, by any name
        self._owners = [Owner(vars(owner)) for owner in owners.values()]
        self._plan = plan
        self._run = run
        self._turns = Turns(plan.tell, follows=plan.hear is not None)
        self._turns.set_alone(True)  # the first batch shows how the handler works, and may compile
        self._alone_because = ""
        self._last_seq = 0
        self._frames: dict[int, Frame] = {}  # of batches that have not started
        self._current: _UnderWay | None = None  # whose turn it is
        self._finishing = threading.Lock()
        self._finished = 0
        self._finished_early: set[int] = set()
        self._talked_first = 0  # the last batch that used collectives before its first run
        self._talked_later = False  # or there were further runs

    # ── the rank ──

    def serve(self) -> None:
        """Serves until SHUTDOWN.

        Raises:
            BaseException: what ended a batch's thread.
        """
        global _active
        _active = self
        settle_in = self._plan.settings()
        for _ in range(self._plan.batches + 1):  # one reads while all places are taken: the server may want to stop
            threading.Thread(target=self._work, args=(settle_in,), name=BATCH_THREAD, daemon=True).start()
        if self._plan.hear is not None:
            threading.Thread(target=self._follow, args=(self._plan.hear,), name="minserve-moves", daemon=True).start()
        try:
            self._turns.wait_for_end()
        finally:
            _active = None

    def _work(self, settle_in: Callable[[], None]) -> None:
        try:
            settle_in()
            while seq := self._turns.begin(self._read):
                self._take_up(self._frames.pop(seq))
        except BaseException as error:
            self._turns.abort(error)

    def _follow(self, hear: Callable[[], Move]) -> None:
        try:
            while self._turns.wait_for_move():
                self._turns.hear(hear())
        except Exception as error:
            self._turns.give_up(error)

    def _read(self) -> None:
        """Waits for the next batch, or for SHUTDOWN."""
        frame = self._inbox.next()
        if frame.kind is Kind.BATCH:
            if frame.seq != self._last_seq + 1:
                raise OutOfOrder(f"got batch {frame.seq} after batch {self._last_seq}")
            self._last_seq = frame.seq
            self._frames[frame.seq] = frame
            self._turns.announce(frame.seq, apart=bool(frame.flags & PROBE))
        elif frame.kind is Kind.SHUTDOWN:
            self._turns.stop()

    # ── a batch ──

    def _take_up(self, frame: Frame) -> None:
        self._slot.received(frame.seq)
        batch = _UnderWay(frame.seq, BatchContext(self._context), Scratch(self._owners))
        self._current = batch
        self._run(frame, batch.context)
        if self._current is batch:  # else it has failed, and given its turn up
            if not frame.flags & PROBE:
                self._turns.set_alone(bool(self._alone_because))
            self._give_up(batch)
            self._turns.end(frame.seq)
        self._finish(frame.seq)

    def _finish(self, seq: int) -> None:
        """Batches that fail before they pause are over before earlier ones, but what is shown is how far all are."""
        with self._finishing:
            self._finished_early.add(seq)
            while self._finished + 1 in self._finished_early:
                self._finished += 1
                self._finished_early.remove(self._finished)
            self._slot.finished(self._finished)
            self._inbox.finished(self._finished)

    def handled(self) -> None:
        """The handler is through with the batch whose turn it is; nothing has been answered yet.

        Raises:
            RuntimeError: see `_listen`.
        """
        assert self._current is not None
        self._listen(self._current, issued_collectives())

    def leave_failed(self, seq: int) -> None:
        """The batch whose turn it is has failed, and the server knows. Returns when every rank is known to have left it."""
        assert self._current is not None
        self._give_up(self._current)
        self._turns.fail(seq)
        self._inbox.wait_for_continue(seq)
        self._turns.settle(seq)

    def _give_up(self, batch: _UnderWay) -> None:
        """The batch is over."""
        batch.scratch.give_back()
        self._current = None

    # ── in `Pipeline.run` ──

    def await_result(
        self, ticket: Ticket, issued: int, receive: Callable[[], R], ready: Callable[[], bool] | None = None
    ) -> R:
        """The result of a run of the pipeline in the batch whose turn it is. Meanwhile others have their turns.

        Args:
            ticket: of the run.
            issued: collectives until it began.
            receive, ready: see `Turns.pause`.
        """
        batch = self._current
        assert batch is not None
        where = _where_none_can_pause(batch.thread)
        if where:
            self._one_at_a_time(f"Pipeline.run is called in {where}")
            return self._turns.keep(ticket, receive)
        self._listen(batch, issued, again=ticket.run > 1)
        stream = streaming.current()
        streaming.set_current(None)
        batch.scratch.put_aside()
        self._current = None
        try:
            return self._turns.pause(ticket, receive, ready)
        finally:
            self._current = batch
            batch.context.show()
            batch.scratch.bring_back()
            streaming.set_current(stream)
            batch.first_turn = False
            batch.issued = issued_collectives()

    # ── collectives around it ──

    def _listen(self, batch: _UnderWay, issued: int, *, again: bool = False) -> None:
        """Looks whether the handler has used collectives outside of `Pipeline.run` in the turn that ends.

        The other stages take one batch after another. With some in front of the first run and others behind it, what
        this rank does first for the next batch would meet what they do last for this one; or wait for it, if that is a
        further run.

        Args:
            again: the turn ends with a further run.

        Raises:
            RuntimeError: it has met.
        """
        talked = issued != batch.issued
        if not talked and not again:
            return
        if batch.first_turn:
            self._talked_first = batch.seq
        else:
            self._talked_later = True
            if talked and self._talked_first > batch.seq:
                raise RuntimeError(
                    f"ranks out of step: batch {batch.seq} used collectives behind Pipeline.run, after batch "
                    f"{self._talked_first} had used some in front of it; set minserve.inFlight to 1"
                )
        if self._talked_first and self._talked_later:
            self._one_at_a_time("the handler uses collectives in front of Pipeline.run and needs the others again")

    def _one_at_a_time(self, reason: str) -> None:
        if not self._alone_because:
            logger.info("one batch at a time, the stages do not overlap: %s", reason)
            self._alone_because = reason
            self._turns.set_alone(True)


def _where_none_can_pause(thread: threading.Thread) -> str:
    """Where the caller is, if other code of the handler's would run on while it pauses; "" if none would."""
    if threading.current_thread() is not thread:
        return "a thread of the handler's own"
    asyncio = sys.modules.get("asyncio")  # there is no event loop without it
    return "a coroutine" if asyncio is not None and asyncio._get_running_loop() is not None else ""
