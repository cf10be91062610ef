from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minserve.dispatch.request import Reply, Request
from minserve.errors import BadRequest, DeadlineExceeded, MinServeError, ModelUnhealthy, QueueFull, WorkerFailed
from minserve.wire.messages import Answer
from tests.unit.dispatch.rig import FakeLane, Rig, settle

T = TypeVar("T")


async def bodies(tasks: list[asyncio.Task[Reply]]) -> str:
    return "".join([bytes((await task).body).decode() for task in tasks])


# ── admission ──


@pytest.mark.asyncio
async def test_the_queue_is_bounded_and_what_is_under_way_does_not_count() -> None:
    rig = Rig(queue_limit=2)
    tasks = await rig.submit("a")
    await rig.advance()  # a is under way
    tasks += await rig.submit("bc")
    assert (rig.dispatcher.queued, rig.dispatcher.remaining) == (2, 0)
    (refused,) = await rig.submit("d")
    with pytest.raises(QueueFull, match=r'Model "m" has no worker to serve .*: 2 requests wait already'):
        await refused
    rig.lane.free()
    await rig.advance()
    assert rig.dispatcher.remaining == 1
    tasks += await rig.submit("e")
    for _ in range(3):
        rig.lane.free()
        await rig.advance()
    assert await bodies(tasks) == "abce"


@pytest.mark.asyncio
async def test_a_refusal_answers_those_that_wait_and_those_that_come_but_none_under_way() -> None:
    rig = Rig()
    (a,) = await rig.submit("a")
    await rig.advance()
    (b,) = await rig.submit("b")
    rig.dispatcher.refuse(ModelUnhealthy("gave up"))
    (c,) = await rig.submit("c")
    for task in (b, c):
        with pytest.raises(ModelUnhealthy, match="gave up"):
            await task
    assert rig.dispatcher.queued == 0
    rig.lane.free()
    await rig.advance()
    assert await bodies([a]) == "a"


@pytest.mark.asyncio
async def test_who_finds_the_queue_full_is_told_when_to_come_again() -> None:
    rig = Rig(queue_limit=10)
    for _ in range(50):  # ten answers a second
        (task,) = await rig.submit("a")
        await rig.advance(0.1)
        rig.lane.free()
        await rig.advance()
        await task
    await rig.submit("b" * 11)
    (refused,) = await rig.submit("c")
    with pytest.raises(QueueFull) as caught:
        await refused
    assert caught.value.retry_after == pytest.approx(1.0, rel=0.1)


@pytest.mark.asyncio
async def test_before_the_first_answer_nobody_knows() -> None:
    rig = Rig(queue_limit=1)
    await rig.submit("ab")
    (refused,) = await rig.submit("c")
    with pytest.raises(QueueFull) as caught:
        await refused
    assert caught.value.retry_after is None


@pytest.mark.asyncio
async def test_after_a_refusal_requests_can_be_admitted_again() -> None:
    rig = Rig()
    rig.dispatcher.refuse(ModelUnhealthy("gave up"))
    rig.dispatcher.admit()
    tasks = await rig.submit("a")
    await rig.advance()
    rig.lane.free()
    assert await bodies(tasks) == "a"


# ── a worker fails with requests in flight ──

DIED = WorkerFailed("m/0: rank 1 was killed by SIGKILL")


@pytest.mark.asyncio
async def test_without_retries_every_request_in_flight_is_answered() -> None:
    rig = Rig(batch_size=2)
    tasks = await rig.submit("ab")
    await rig.advance()
    rig.lane.fail(DIED)
    for task in tasks:
        with pytest.raises(WorkerFailed, match="rank 1"):
            await task
    assert rig.lane.sent == [["a", "b"]]


@pytest.mark.asyncio
async def test_with_retries_each_goes_again_alone_and_before_those_that_wait() -> None:
    rig = Rig(batch_size=2, max_delay=5.0, retries=1)
    tasks = await rig.submit("ab")
    await rig.advance()
    tasks += await rig.submit("cd")
    rig.lane.fail(DIED)
    for _ in range(4):
        await rig.advance()
        if rig.lane.batches:
            rig.lane.free()
    assert rig.lane.sent == [["a", "b"], ["a"], ["b"], ["c", "d"]]
    assert await bodies(tasks) == "abcd"


@pytest.mark.asyncio
async def test_what_no_rank_had_begun_waits_again_as_if_it_had_never_been_sent() -> None:
    rig = Rig(batch_size=2)
    rig.lane.places = 2
    tasks = await rig.submit("abcd")
    await rig.advance()
    tasks += await rig.submit("e")
    rig.lane.fail(DIED)
    rig.lane.fail(DIED, begun=False)
    await rig.advance()
    rig.lane.free()
    await rig.advance()
    rig.lane.free()
    assert rig.lane.sent == [["a", "b"], ["c", "d"], ["c", "d"], ["e"]]
    assert await bodies(tasks[2:]) == "cde"
    for task in tasks[:2]:
        with pytest.raises(WorkerFailed):
            await task


@pytest.mark.asyncio
async def test_what_no_rank_had_begun_is_answered_where_nobody_will_take_it() -> None:
    rig = Rig(retries=5)
    (task,) = await rig.submit("a")
    await rig.advance()
    rig.dispatcher.refuse(ModelUnhealthy("no"))
    rig.lane.fail(DIED, begun=False)
    with pytest.raises(WorkerFailed, match="rank 1"):
        await task


@pytest.mark.asyncio
async def test_a_request_that_kills_worker_after_worker_is_given_up() -> None:
    rig = Rig(retries=2)
    (task,) = await rig.submit("a")
    for _ in range(3):
        await rig.advance()
        rig.lane.fail(DIED)
    with pytest.raises(WorkerFailed, match="rank 1"):
        await task
    assert rig.lane.sent == [["a"]] * 3
    assert rig.dispatcher.queued == 0


@pytest.mark.asyncio
async def test_what_is_past_its_deadline_or_has_no_client_or_streams_is_not_sent_again() -> None:
    rig = Rig(batch_size=4, retries=5)
    late, left, streams, good = await rig.submit("absg")
    await rig.advance()
    (batch,) = rig.lane.batches
    left.cancel()
    await settle()
    batch[2].chunk(Answer(0, 1), b"1", 100, lambda: None)
    batch[0].deadline = rig.clock.time()
    rig.lane.fail(DIED)
    await rig.advance()
    rig.lane.free()
    assert rig.lane.sent == [["a", "b", "s", "g"], ["g"]]
    with pytest.raises(WorkerFailed):
        await late
    reply = await streams
    assert reply.stream is not None
    assert await reply.stream.take(1) == [b"1"]
    with pytest.raises(WorkerFailed):
        await reply.stream.take(1)
    assert await bodies([good]) == "g"


@pytest.mark.asyncio
async def test_once_the_model_refuses_nothing_is_sent_again() -> None:
    rig = Rig(retries=5)
    (task,) = await rig.submit("a")
    await rig.advance()
    rig.dispatcher.refuse(ModelUnhealthy("gave up"))
    rig.lane.fail(DIED)
    with pytest.raises(WorkerFailed):
        await task
    assert rig.dispatcher.queued == 0


@pytest.mark.asyncio
async def test_a_thousand_clients_that_left_or_were_too_late_cost_the_next_one_nothing() -> None:
    rig = Rig(queue_limit=2000)
    (first,) = await rig.submit("x")
    await rig.advance()
    for _ in range(500):
        (task,) = await rig.submit("c")
        task.cancel()
        await rig.submit("t", timeout=1.0)
    await rig.advance(1.5)
    assert rig.dispatcher.queued == 0
    (good,) = await rig.submit("g")
    rig.lane.free()
    await rig.advance()
    rig.lane.free()
    assert await bodies([first, good]) == "xg"
    assert rig.lane.sent == [["x"], ["g"]]


# ── when a batch is cut ──


@pytest.mark.asyncio
async def test_requests_that_arrive_together_travel_together_also_without_delay() -> None:
    rig = Rig(batch_size=4)
    await rig.submit("abc")
    assert rig.lane.sent == []  # not inside submit, or a would have gone alone
    await rig.advance()
    assert rig.lane.sent == [["a", "b", "c"]]


@pytest.mark.asyncio
async def test_a_full_batch_goes_at_once_whatever_the_delay() -> None:
    rig = Rig(batch_size=3, max_delay=10)
    await rig.submit("abcd")
    await rig.advance()
    assert rig.lane.sent == [["a", "b", "c"]]


@pytest.mark.asyncio
async def test_a_batch_that_is_not_full_goes_when_its_oldest_has_waited_the_delay() -> None:
    rig = Rig(batch_size=3, max_delay=10)
    await rig.submit("a")
    await rig.advance(6)
    await rig.submit("b")  # does not start the wait anew
    await rig.advance(3.9)
    assert rig.lane.sent == []
    await rig.advance(0.1)
    assert rig.lane.sent == [["a", "b"]]


@pytest.mark.asyncio
async def test_the_next_batch_has_a_wait_of_its_own() -> None:
    rig = Rig(batch_size=2, max_delay=10)
    rig.lane.places = 9
    await rig.submit("abc")
    await rig.advance(4)
    await rig.submit("d")
    await rig.advance()
    assert rig.lane.sent == [["a", "b"], ["c", "d"]]
    await rig.submit("e")
    await rig.advance(9.9)
    assert len(rig.lane.sent) == 2
    await rig.advance(0.1)
    assert rig.lane.sent[2:] == [["e"]]


@pytest.mark.asyncio
async def test_what_waited_for_a_place_longer_than_the_delay_goes_with_the_place() -> None:
    rig = Rig(batch_size=2, max_delay=10)
    await rig.submit("ab")
    await rig.advance()
    await rig.submit("c")
    await rig.advance(11)
    assert rig.lane.sent == [["a", "b"]]
    rig.lane.free()
    await rig.advance()
    assert rig.lane.sent == [["a", "b"], ["c"]]


@pytest.mark.asyncio
async def test_batches_are_cut_late_so_that_they_fill_while_the_worker_is_busy() -> None:
    rig = Rig(batch_size=3)
    for name in "abcde":
        await rig.submit(name)
        await rig.advance(1)
    rig.lane.free()
    await rig.advance()
    assert rig.lane.sent == [["a"], ["b", "c", "d"]]


# ── lanes ──


@pytest.mark.asyncio
async def test_lanes_take_turns() -> None:
    rig = Rig(lanes=3)
    for name in "abcdef":
        await rig.submit(name)
        await rig.advance()
        for lane in rig.lanes:
            if lane.batches:
                lane.free()
    assert [lane.sent for lane in rig.lanes] == [[["a"], ["d"]], [["b"], ["e"]], [["c"], ["f"]]]


@pytest.mark.asyncio
async def test_the_lane_with_the_fewest_batches_before_it_is_next() -> None:
    rig = Rig(lanes=2)
    for lane in rig.lanes:
        lane.places = 3
    for name in "abcd":
        await rig.submit(name)
        await rig.advance()
    rig.lanes[1].free()
    rig.lanes[1].free()
    for name in "ef":
        await rig.submit(name)
        await rig.advance()
    assert [lane.sent for lane in rig.lanes] == [[["a"], ["c"]], [["b"], ["d"], ["e"], ["f"]]]


@pytest.mark.asyncio
async def test_a_batch_that_is_not_full_waits_for_an_idle_lane_where_lanes_say_so() -> None:
    rig = Rig(batch_size=2)
    rig.lane.places, rig.lane.only_full = 3, True
    await rig.submit("abcde")
    await rig.advance()
    assert rig.lane.sent == [["a", "b"], ["c", "d"]]
    rig.lane.free()
    await rig.advance()
    assert len(rig.lane.sent) == 2
    await rig.submit("f")
    await rig.advance()
    assert rig.lane.sent[2:] == [["e", "f"]]


@pytest.mark.asyncio
async def test_a_lane_without_a_place_is_passed_over() -> None:
    rig = Rig(lanes=2)
    rig.lanes[0].places = 0
    await rig.submit("abc")
    await rig.advance()
    assert [lane.sent for lane in rig.lanes] == [[], [["a"]]]
    rig.lanes[0].places = 5
    rig.dispatcher.wake()
    await rig.advance()
    assert rig.lanes[0].sent == [["b"], ["c"]]


@pytest.mark.asyncio
async def test_one_wake_fills_every_free_place() -> None:
    rig = Rig(batch_size=2, lanes=2)
    rig.lanes[0].places = 2
    await rig.submit("abcdefgh")
    await rig.advance()
    assert rig.sent == list("abcdef")
    assert rig.dispatcher.queued == 2


@pytest.mark.asyncio
async def test_what_waits_goes_to_a_lane_that_attaches_and_to_none_that_detached() -> None:
    rig = Rig(lanes=2)
    for lane in rig.lanes:
        rig.dispatcher.detach(lane)
    rig.dispatcher.detach(rig.lanes[0])  # twice does no harm: a worker may fail while it drains
    await rig.submit("ab")
    await rig.advance(5)
    assert rig.sent == []
    rig.dispatcher.attach(rig.lanes[1])
    await rig.advance()
    assert [lane.sent for lane in rig.lanes] == [[], [["a"]]]


# ── deadlines ──


@pytest.mark.asyncio
async def test_a_request_that_expires_in_the_queue_is_answered_and_leaves_it() -> None:
    rig = Rig(lanes=0)
    (a,) = await rig.submit("a", timeout=5)
    (b,) = await rig.submit("b", timeout=9)
    await rig.advance(4.9)
    assert not a.done()
    await rig.advance(0.1)
    with pytest.raises(DeadlineExceeded, match='Model "m": no answer') as caught:
        await a
    assert caught.value.status == 504
    assert rig.dispatcher.queued == 1
    await rig.advance(4)  # the alarm was set anew
    with pytest.raises(DeadlineExceeded):
        await b
    assert rig.dispatcher.queued == 0


@pytest.mark.asyncio
async def test_an_earlier_deadline_that_comes_later_is_kept() -> None:
    rig = Rig(lanes=0)
    await rig.submit("a", timeout=50)
    (b,) = await rig.submit("b", timeout=1)
    await rig.advance(1)
    with pytest.raises(DeadlineExceeded):
        await b


@pytest.mark.asyncio
async def test_an_expired_request_takes_no_slot_of_a_batch() -> None:
    rig = Rig(batch_size=2)
    rig.lane.places = 0
    (a,) = await rig.submit("a", timeout=5)
    await rig.submit("bc")
    rig.clock._now += 5  # due, but the alarm has not rung yet: `_take` meets it
    rig.lane.places = 1
    rig.dispatcher._cut()
    assert rig.lane.sent == [["b", "c"]]
    with pytest.raises(DeadlineExceeded):
        await a


@pytest.mark.asyncio
async def test_who_asks_again_from_where_it_is_told_of_its_expiry_waits_its_turn() -> None:
    """As the connection of a pipelining client does (frontend/passage.py)."""

    class AsksAgain(asyncio.Future[Reply]):
        def set_exception(self, exception: type[BaseException] | BaseException) -> None:
            super().set_exception(exception)
            rig.dispatcher.begin(rig.request("c"))

    rig = Rig()
    rig.lane.places = 0
    late = rig.request("a", timeout=5)
    late.reply = AsksAgain()
    rig.dispatcher.begin(late)
    rig.dispatcher.begin(rig.request("b"))
    rig.clock._now += 5
    rig.lane.places = 1
    rig.dispatcher._cut()
    assert isinstance(late.reply.exception(), DeadlineExceeded)
    assert (rig.lane.sent, rig.dispatcher.queued) == ([["b"]], 1)
    rig.lane.free()
    assert rig.lane.sent == [["b"], ["c"]]


@pytest.mark.asyncio
async def test_expiry_in_flight_answers_the_client_but_frees_no_place() -> None:
    rig = Rig()
    (a,) = await rig.submit("a", timeout=5)
    await rig.advance()
    (b,) = await rig.submit("b")
    await rig.advance(5)
    with pytest.raises(DeadlineExceeded):
        await a
    assert rig.lane.sent == [["a"]]
    rig.lane.free()  # the late answer is dropped
    await rig.advance()
    rig.lane.free()
    assert await bodies([b]) == "b"


@pytest.mark.asyncio
async def test_a_stream_that_has_begun_has_no_deadline() -> None:
    rig = Rig()
    (a,) = await rig.submit("a", timeout=5)
    await rig.advance()
    (request,) = rig.lane.batches[0]
    request.chunk(Answer(0, 1), b"1", 100, lambda: None)
    await rig.advance(100)
    stream = (await a).stream
    assert stream is not None
    request.answer(Answer(0, 1), b"2")
    assert [await stream.take(1) for _ in range(3)] == [[b"1"], [b"2"], []]


# ── clients that leave ──


@pytest.mark.asyncio
async def test_a_client_that_leaves_takes_its_request_out_of_the_queue() -> None:
    rig = Rig(batch_size=2)
    rig.lane.places = 0
    tasks = await rig.submit("abcd")
    tasks[1].cancel()
    await settle()
    assert rig.dispatcher.queued == 3
    rig.lane.places = 1
    rig.dispatcher.wake()
    await rig.advance()
    assert rig.lane.sent == [["a", "c"]]


@pytest.mark.asyncio
async def test_a_client_that_leaves_in_the_tick_of_the_cut_is_not_sent() -> None:
    rig = Rig(batch_size=2)
    tasks = await rig.submit("abc")
    tasks[0].cancel()  # its task has not run yet, the request still lies in the queue
    rig.clock.advance()
    assert rig.lane.sent == [["b", "c"]]


@pytest.mark.asyncio
async def test_a_batch_of_which_nobody_is_left_is_not_sent() -> None:
    rig = Rig(batch_size=2)
    for task in await rig.submit("ab"):
        task.cancel()
    rig.clock.advance()
    assert rig.lane.sent == []


@pytest.mark.asyncio
async def test_a_client_that_leaves_in_flight_frees_no_place_and_its_answer_is_dropped() -> None:
    rig = Rig()
    (a,) = await rig.submit("a")
    await rig.advance()
    a.cancel()
    await rig.submit("b")
    await rig.advance()
    assert rig.lane.sent == [["a"]]
    rig.lane.free()
    await rig.advance()
    assert rig.lane.sent == [["a"], ["b"]]


@pytest.mark.asyncio
@pytest.mark.parametrize("first", ["chunk", "cancel"])
async def test_a_client_that_leaves_in_the_tick_of_the_first_chunk_mutes_the_stream(first: str) -> None:
    """Else nobody would take the chunks, and they would pile up for as long as the handler streams."""
    rig = Rig()
    (a,) = await rig.submit("a")
    await rig.advance()
    (request,) = rig.lane.batches[0]
    for event in (first, "cancel" if first == "chunk" else "chunk"):
        if event == "chunk":
            request.chunk(Answer(0, 1), b"1", 100, lambda: None)
        else:
            a.cancel()
    await settle()
    assert a.cancelled()
    assert request.stream is not None
    assert request.stream.muted


# ── whoever has no task that could wait ──


@pytest.mark.asyncio
async def test_a_request_that_was_only_begun_counts_until_it_is_finished() -> None:
    rig = Rig()
    request = rig.request("a")
    rig.dispatcher.begin(request)
    answered = asyncio.create_task(rig.dispatcher.answered())
    rig.lane.free()
    await settle()
    assert bytes(request.reply.result().body) == b"a"
    assert not answered.done()
    rig.dispatcher.finish(request, answered=True)
    await answered


@pytest.mark.asyncio
async def test_a_request_that_was_only_begun_can_leave_the_queue_again() -> None:
    rig = Rig()
    rig.lane.places = 0
    request = rig.request("a")
    rig.dispatcher.begin(request)
    request.reply.cancel()
    rig.dispatcher.withdraw(request)
    rig.dispatcher.finish(request, answered=False)
    assert rig.dispatcher.queued == 0
    await rig.dispatcher.answered()


@pytest.mark.asyncio
async def test_what_is_refused_is_not_begun() -> None:
    rig = Rig(queue_limit=0)
    with pytest.raises(QueueFull):
        rig.dispatcher.begin(rig.request("a"))
    await rig.dispatcher.answered()


class BrokenLane:
    under_way = 0
    batch_seconds = None

    def has_place(self, *, full: bool, ahead: int = 0) -> bool:
        return True

    def send(self, requests: list[Request]) -> None:
        raise UnicodeEncodeError("utf-8", "x", 0, 1, "no such batch")


@pytest.mark.asyncio
async def test_a_batch_that_cannot_be_sent_is_answered_and_those_behind_it_go_on() -> None:
    rig = Rig(lanes=0)
    broken = BrokenLane()
    rig.dispatcher.attach(broken)
    (a,) = await rig.submit("a")
    await rig.advance()
    with pytest.raises(MinServeError, match="could not be sent to the ranks"):
        await a
    rig.dispatcher.detach(broken)
    lane = FakeLane(rig)
    rig.dispatcher.attach(lane)
    (b,) = await rig.submit("b")
    await rig.advance()
    lane.free()
    assert await bodies([b]) == "b"


@pytest.mark.asyncio
async def test_a_batch_that_the_lane_refuses_is_answered_with_its_reason() -> None:
    class Refusing(BrokenLane):
        def send(self, requests: list[Request]) -> None:
            raise BadRequest("too many headers")

    rig = Rig(lanes=0)
    rig.dispatcher.attach(Refusing())
    (a,) = await rig.submit("a")
    await rig.advance()
    with pytest.raises(BadRequest, match="too many headers"):
        await a


@pytest.mark.asyncio
async def test_a_late_request_is_told_whether_it_waited_or_was_worked_on() -> None:
    rig = Rig()
    (a,) = await rig.submit("a", timeout=1)
    await rig.advance()
    rig.lane.batches[0][0].worker = "m/0"
    (b,) = await rig.submit("b", timeout=1)
    await rig.advance(2)
    for task, where in ((a, "m/0 is still at work on it"), (b, "it was still in the queue")):
        with pytest.raises(DeadlineExceeded, match=where):
            await task


# ── whatever happens ──


class Traffic(RuleBasedStateMachine):
    """Random submits, leavings, passing time, places and workers that come and go.

    Requests are named by their arrival, so FIFO and "nothing sent twice" are one look at the order of the names. `FakeLane`
    itself checks that no batch goes where there is no place, nor for a client that has gone.
    """

    BATCH, DELAY, LIMIT = 3, 2.0, 5

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.rig = Rig(self.BATCH, self.DELAY, self.LIMIT, lanes=0)
        self.dispatcher = self.rig.dispatcher
        self.lanes: list[FakeLane] = []  # attached
        self.gone: list[FakeLane] = []  # detached, perhaps with batches under way
        self.tasks: list[asyncio.Task[Reply]] = []
        self.arrived: list[float] = []
        self.cancelled: set[int] = set()
        self.waiters: list[asyncio.Task[None]] = []

    def run(self, work: Coroutine[object, object, T]) -> T:
        return self.loop.run_until_complete(work)

    @rule(timeout=st.sampled_from([0.5, 3.0, 50.0]), count=st.integers(1, 4))
    def submit(self, timeout: float, count: int) -> None:
        async def go() -> None:
            for _ in range(count):
                request = self.rig.request(f"{len(self.tasks):04}", timeout)
                self.arrived.append(self.rig.clock.time())
                self.tasks.append(asyncio.create_task(self.dispatcher.submit(request)))
            await settle()

        self.run(go())

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), at_once=st.booleans())
    def leave(self, data: st.DataObject, at_once: bool) -> None:
        index = data.draw(st.integers(max(0, len(self.tasks) - 8), len(self.tasks) - 1))
        if self.tasks[index].cancel():
            self.cancelled.add(index)
        if at_once:
            self.rig.clock.advance()  # the dispatcher comes before the cancelled task does
        self.run(settle())

    @rule(seconds=st.sampled_from([0.0, 0.25, 2.0, 5.0]))
    def advance(self, seconds: float) -> None:
        self.run(self.rig.advance(seconds))

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if busy := [lane for lane in self.lanes + self.gone if lane.batches]:
            data.draw(st.sampled_from(busy)).free()
            self.run(settle())

    @precondition(lambda self: len(self.lanes) < 3)
    @rule(places=st.integers(1, 2))
    def attach(self, places: int) -> None:
        self.lanes.append(FakeLane(self.rig, places))
        self.dispatcher.attach(self.lanes[-1])

    @precondition(lambda self: self.lanes)
    @rule()
    def detach(self) -> None:
        self.gone.append(self.lanes.pop(0))
        self.dispatcher.detach(self.gone[-1])

    @invariant()
    def order_is_kept_and_nothing_goes_twice(self) -> None:
        assert all(a < b for a, b in zip(self.rig.sent, self.rig.sent[1:], strict=False))

    @invariant()
    def bounds_are_kept(self) -> None:
        assert self.dispatcher.queued <= self.LIMIT
        assert all(1 <= len(batch) <= self.BATCH for lane in self.lanes + self.gone for batch in lane.sent)

    @invariant()
    def whoever_waits_for_all_answers_waits_for_them_and_no_longer(self) -> None:
        self.waiters.append(self.loop.create_task(self.dispatcher.answered()))
        self.run(settle())
        assert self.waiters[-1].done() == (not self.dispatcher._live)
        if not self.dispatcher._live:
            assert all(waiter.done() for waiter in self.waiters)
            self.waiters.clear()

    @invariant()
    def nothing_waits_that_could_go(self) -> None:
        self.rig.clock.advance()
        self.run(settle())
        if any(lane.has_place(full=True) for lane in self.lanes) and (queue := self.dispatcher._queue):
            assert len(queue) < self.BATCH
            assert self.rig.clock.time() < queue[0].arrived + self.DELAY

    def teardown(self) -> None:
        try:
            self.attach(2)
            for _ in range(len(self.tasks) + 1):
                for lane in self.lanes + self.gone:
                    while lane.batches:
                        lane.free()
                self.run(self.rig.advance(self.DELAY))
            for index, task in enumerate(self.tasks):
                assert task.done(), "a request without an answer"
                if task.cancelled():
                    assert index in self.cancelled
                elif (error := task.exception()) is not None:
                    assert isinstance(error, QueueFull | DeadlineExceeded)
                else:
                    assert task.result().body == f"{index:04}".encode()
            assert not self.dispatcher._live  # nothing is kept of a request that is over
            assert self.dispatcher.queued == 0
        finally:
            self.loop.close()


TestTraffic = Traffic.TestCase
TestTraffic.settings = hypothesis.settings(max_examples=60, stateful_step_count=40)


@pytest.mark.asyncio
async def test_a_batch_is_of_one_operation_and_a_describe_travels_alone() -> None:
    rig = Rig(batch_size=4)
    await rig.submit("abxycDED")
    await rig.advance()
    for _ in range(6):
        rig.lane.free()
        await rig.advance()
    assert rig.lane.sent == [["a", "b"], ["x", "y"], ["c"], ["D"], ["E"], ["D"]]


# ── what is measured ──


@pytest.mark.asyncio
async def test_waiting_for_company_and_for_a_place_are_measured_apart() -> None:
    rig = Rig(batch_size=2, max_delay=1.0)
    meters = rig.dispatcher.meters
    meters.now = rig.clock.time
    tasks = await rig.submit("a")
    await rig.advance(0.25)
    tasks += await rig.submit("b")  # the batch is full: "a" has waited 0.25 s for it
    tasks += await rig.submit("c")  # due in 1 s, but the lane is taken for 3 s
    await rig.advance(3.0)
    rig.lane.free()
    await rig.advance()
    rig.lane.free()
    await asyncio.gather(*tasks)
    assert meters.batch_wait.total == pytest.approx(0.25 + 1.0)
    assert meters.queue.total == pytest.approx(2.0)
    assert meters.queue.buckets()[-1][1] == meters.batch_wait.buckets()[-1][1] == 3


@pytest.mark.asyncio
async def test_a_request_that_is_refused_counts_and_one_that_describes_does_not() -> None:
    rig = Rig()
    rig.dispatcher.refuse(ModelUnhealthy("no"))
    asked = rig.request("a")
    described = rig.request("b")
    described.meta.operation = "describe"
    for request in (asked, described):
        with pytest.raises(ModelUnhealthy):
            await rig.dispatcher.submit(request)
    lines = rig.dispatcher.meters._metrics.text().splitlines()
    assert [line[-4:] for line in lines if line.startswith("ts_inference_requests_total{")] == [" 1.0"]
