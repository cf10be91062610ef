"""Streams over a broadcast with in-memory links: four steps are granted ahead, a client may have 100 bytes waiting."""

import itertools

import pytest

from minserve.dispatch.request import Request
from minserve.errors import DeadlineExceeded, HandlerError, WireError
from minserve.telemetry.events import EventKind
from minserve.wire.frames import Kind
from minserve.wire.messages import Batch, unpack
from minserve.worker import streams
from tests.unit.worker.broadcasts import AHEAD, BUFFER, GRACE, TIMEOUT, Group, error_of, failure, reply_frame

pytestmark = pytest.mark.asyncio


async def read(stream: object, chunks: int = 1) -> None:
    for _ in range(chunks):
        assert await stream.take(1)  # type: ignore[attr-defined]


def cancelled(group: Group, rank: int, seq: int) -> None:
    group.error(rank, seq, failure("cancelled", "", "", tuple(range(len(group.links)))))


async def test_a_batch_carries_its_first_grant() -> None:
    group = Group()
    group.send(b"x")
    assert unpack(Batch, group.links[1].frames[0].meta).grant == AHEAD


async def test_while_clients_keep_up_every_rank_is_granted_the_same_steps_ahead_of_rank_0() -> None:
    group = Group(ranks=3)
    (request,) = group.send(b"x")
    for step in range(1, 10):
        group.chunk(1, (0, b"c"))
        assert request.stream is not None
        await read(request.stream)
        granted = group.told(Kind.GRANT)[-1] if group.told(Kind.GRANT) else AHEAD
        assert step < granted <= step + AHEAD
    assert group.told(Kind.GRANT, 0) == group.told(Kind.GRANT, 1) == group.told(Kind.GRANT, 2) == [6, 8, 10, 12]


async def take_together(group: Group, steps: int, chunk: bytes = b"c") -> None:
    """So many steps with one read of rank 0's link."""
    group.receive_together(0, *[group.chunk_frame(1, (0, chunk)) for _ in range(steps)])


@pytest.mark.parametrize("ahead", [AHEAD, None], ids=["fixed", "automatic"])
async def test_the_steps_of_one_read_bring_one_grant(ahead: int | None) -> None:
    group = Group(stream_ahead=ahead)
    group.send(b"x")
    await take_together(group, 4)
    assert group.told(Kind.GRANT, 0) == group.told(Kind.GRANT, 1) == [4 + (ahead or 4 * streams.AHEAD)]


async def test_unless_told_otherwise_quick_ranks_are_granted_more_steps_ahead_and_slow_ones_few() -> None:
    group = Group(stream_ahead=None)
    (request,) = group.send(b"x")
    assert unpack(Batch, group.links[1].frames[0].meta).grant == streams.AHEAD
    for steps in (8, 40, 40):
        await take_together(group, steps)
    most = streams.MOST_AHEAD
    assert group.told(Kind.GRANT) == [8 + most, 48 + most, 88 + most]
    for _ in range(2 * most):
        await take_together(group, 1)
        assert request.stream is not None
        await read(request.stream)
    granted = group.told(Kind.GRANT)[3:]
    assert granted[0] == 88 + most + streams.AHEAD // 2, "not before nearly all of the last grant is used"
    assert {after - before for before, after in itertools.pairwise(granted)} == {streams.AHEAD // 2}


async def test_however_quick_the_ranks_are_a_slow_client_holds_them_at_one_step() -> None:
    group = Group(stream_ahead=None)
    (request,) = group.send(b"x")
    await take_together(group, streams.AHEAD, b"c" * BUFFER)
    assert group.told(Kind.GRANT) == []
    assert request.stream is not None
    await read(request.stream, streams.AHEAD)
    assert group.told(Kind.GRANT, 0) == group.told(Kind.GRANT, 1) == [streams.AHEAD + streams.MOST_AHEAD]


async def test_chunks_that_come_together_with_the_end_are_read_in_order() -> None:
    group = Group()
    (request,) = group.send(b"x")
    chunks = [group.chunk_frame(1, (0, b"%d" % number)) for number in range(3)]
    group.receive_together(0, *chunks, reply_frame(1, b"end"))
    assert request.stream is not None
    assert await request.stream.take(100) == [b"0", b"1", b"2", b"end"]
    assert await request.stream.take(100) == []
    assert group.told(Kind.GRANT) == [], "nobody takes another step"


async def test_a_client_that_reads_nothing_holds_all_ranks_at_one_step_and_the_clock_with_them() -> None:
    group = Group()
    group.finish()
    (request,) = group.send(b"x")
    for _ in range(AHEAD):
        group.chunk(2, (0, b"c" * BUFFER))
    assert group.told(Kind.GRANT) == []
    group.clock.advance(100 * TIMEOUT)
    assert group.broken == [], "the ranks wait for a client, who has a time-out of his own"
    assert request.stream is not None
    await read(request.stream, AHEAD - 1)
    assert group.told(Kind.GRANT) == [], "there is still a whole buffer of it"
    await read(request.stream)
    assert group.told(Kind.GRANT, 0) == group.told(Kind.GRANT, 1) == [2 * AHEAD]
    group.clock.advance(TIMEOUT - 0.1)
    assert group.broken == []
    group.clock.advance(0.2)
    assert [cause.detail for cause in group.broken] == ["did not finish batch 2 within 10 s"]


async def test_one_slow_client_of_a_batch_holds_the_others() -> None:
    group = Group()
    slow, quick = group.send(b"x", b"y")
    for _ in range(AHEAD):
        group.chunk(1, (0, b"c" * BUFFER), (1, b"c"))
        assert quick.stream is not None
        await read(quick.stream)
    assert group.told(Kind.GRANT) == []
    assert slow.stream is not None
    slow.stream.mute()
    assert group.told(Kind.GRANT) == [2 * AHEAD], "it has left: nobody waits for it"


async def test_when_all_clients_have_left_every_rank_is_told_to_end_behind_the_last_granted_step() -> None:
    group = Group(ranks=2)
    first, second = group.send(b"x", b"y")
    group.chunk(1, (0, b"c"), (1, b"c"))
    group.steps = {0: 1, 1: 2}
    assert first.stream is not None
    assert second.stream is not None
    first.stream.mute()
    assert group.told(Kind.CANCEL) == []
    second.stream.mute()
    assert group.told(Kind.CANCEL, 0) == group.told(Kind.CANCEL, 1) == [AHEAD]
    for step in range(2, AHEAD + 1):  # up to there rank 0 goes on
        group.chunk(1, (0, b"c"), step=step)
    assert group.told(Kind.GRANT) == []
    cancelled(group, 1, 1)
    assert group.continued(0) == []
    cancelled(group, 0, 1)
    assert group.continued(0) == group.continued(1) == [1]
    assert not group.broadcast.busy
    assert group.events == [(EventKind.STREAM_CANCELLED, 0)]
    assert group.broken == []


async def test_a_cancelled_stream_that_ends_by_itself_is_over_like_any_other() -> None:
    group = Group()
    (request,) = group.send(b"x")
    group.chunk(1, (0, b"c"))
    group.steps = {0: 1, 1: 1}
    assert request.stream is not None
    request.stream.mute()
    assert group.told(Kind.CANCEL) == [AHEAD]
    group.reply(1, b"")
    assert not group.broadcast.busy


async def test_ranks_that_leave_a_cancelled_stream_at_different_steps_are_out_of_step() -> None:
    group = Group()
    (request,) = group.send(b"x")
    group.chunk(1, (0, b"c"))
    group.steps = {0: 1, 1: 1}
    assert request.stream is not None
    request.stream.mute()
    cancelled(group, 1, 1)
    group.reply(1, b"")
    assert "was at another step" in str(group.broken[0])
    assert group.broken[0].rank == 1


async def test_a_stream_of_rank_0_alone_runs_on_for_nobody() -> None:
    """A rank that counts no steps cannot be told where to stop."""
    group = Group()
    (request,) = group.send(b"x")
    group.chunk(1, (0, b"c"))
    group.steps = {0: 1}
    assert request.stream is not None
    request.stream.mute()
    for _ in range(20):
        group.chunk(1, (0, b"c" * BUFFER))
        group.broadcast.look()
    assert group.told(Kind.CANCEL) == []
    assert group.told(Kind.GRANT)[-1] > 20
    group.reply(1, b"")
    assert not group.broadcast.busy


async def test_a_cancel_waits_until_every_rank_has_counted_a_step() -> None:
    group = Group()
    (request,) = group.send(b"x")
    group.chunk(1, (0, b"c"))
    group.steps = {0: 1}
    assert request.stream is not None
    request.stream.mute()
    group.broadcast.look()
    assert group.told(Kind.CANCEL) == []
    group.steps = {0: 1, 1: 1}
    group.broadcast.look()
    group.broadcast.look()
    assert group.told(Kind.CANCEL) == [AHEAD]


async def test_clients_that_leave_before_the_first_chunk_are_found_at_the_next_look() -> None:
    group = Group()
    (request,) = group.send(b"x")
    request.reply.cancel()
    group.broadcast.look()
    assert group.told(Kind.CANCEL) == [], "it may be no stream at all"
    group.steps = {0: 1, 1: 1}
    group.broadcast.look()
    assert group.told(Kind.CANCEL) == [AHEAD]


async def test_a_deadline_that_passes_before_the_first_chunk_cancels_as_well() -> None:
    group = Group()
    (request,) = group.send(b"x")
    request.fail(DeadlineExceeded("late"))
    group.steps = {0: 1, 1: 1}
    group.chunk(1, (0, b"c"))
    assert group.told(Kind.CANCEL) == [AHEAD]
    assert isinstance(error_of(request), DeadlineExceeded)


async def test_a_chunk_that_cannot_be_sent_is_the_clients_error_and_the_stream_is_cancelled_in_step() -> None:
    group = Group()
    (request,) = group.send(b"x")
    group.chunk(1, (0, b"c"))
    group.steps = {0: 2, 1: 1}
    group.error(0, 1, failure("chunk", "", ""))
    assert request.stream is not None
    assert await request.stream.take(1) == [b"c"]
    with pytest.raises(HandlerError, match="no such word"):
        await request.stream.take(1)
    assert group.told(Kind.CANCEL, 0) == group.told(Kind.CANCEL, 1) == [AHEAD]
    group.chunk(1, step=2)
    cancelled(group, 0, 1)
    cancelled(group, 1, 1)
    assert group.continued(1) == [1]
    assert not group.broadcast.busy
    assert group.broken == []
    assert group.events[0] == (EventKind.HANDLER_ERROR, 0)


async def test_where_it_cannot_be_cancelled_the_ranks_run_to_the_end_without_chunks() -> None:
    group = Group()
    (request,) = group.send(b"x")
    group.error(0, 1, failure("chunk", "", ""))
    assert isinstance(error_of(request), HandlerError)
    for _ in range(3 * AHEAD):
        group.chunk(1)
    assert group.told(Kind.GRANT)[-1] > 3 * AHEAD
    group.reply(1, b"")
    assert not group.broadcast.busy
    assert group.broken == []


async def test_the_same_exception_on_all_ranks_behind_a_bad_chunk_costs_no_restart() -> None:
    group = Group()
    group.send(b"x")
    group.error(0, 1, failure("chunk", "", ""))
    for rank in (1, 0):
        group.error(rank, 1, failure())
    assert group.continued(0) == group.continued(1) == [1]
    assert group.broken == []


async def test_ranks_may_take_long_to_come_to_where_a_stream_was_cancelled() -> None:
    group = Group()
    group.finish()
    (request,) = group.send(b"x")
    group.chunk(2, (0, b"c"))
    group.steps = {0: 1, 1: 1}
    assert request.stream is not None
    request.stream.mute()
    cancelled(group, 0, 2)
    group.clock.advance(TIMEOUT - 0.1)
    assert group.broken == [], "longer than the grace of an error"
    cancelled(group, 1, 2)
    assert not group.broadcast.busy


async def test_a_cancel_that_nobody_has_sent_breaks_the_protocol() -> None:
    group = Group()
    (request,) = group.send(b"x")
    with pytest.raises(WireError, match="was cancelled, which it was not"):
        cancelled(group, 0, 1)
    assert not request.reply.done()


async def test_a_client_that_leaves_after_the_end_of_its_stream_changes_nothing() -> None:
    group = Group()
    (request,) = group.send(b"x")
    group.chunk(1, (0, b"c" * BUFFER))
    group.steps = {0: 1, 1: 1}
    group.reply(1, b"")
    assert request.stream is not None
    await read(request.stream)
    request.stream.mute()
    assert group.told(Kind.CANCEL) == []
    assert group.told(Kind.GRANT) == []


async def test_a_client_that_reads_nothing_stops_the_clock_of_the_batches_around_its_own_too() -> None:
    group = Group(in_flight=3)
    group.finish()
    for name in (b"x", b"y", b"z"):
        (request,) = group.send(name)
        if name == b"y":
            slow = request
    group.clock.advance(TIMEOUT - 1)
    for _ in range(AHEAD):  # in a pipeline the second batch may have the ranks' turn
        group.chunk(3, (0, b"c" * BUFFER))
    group.clock.advance(100 * TIMEOUT)
    assert group.broken == []
    assert slow.stream is not None
    await read(slow.stream, AHEAD)
    group.clock.advance(TIMEOUT - 0.1)
    assert group.broken == []
    group.clock.advance(0.2)
    assert [cause.detail for cause in group.broken] == ["did not finish batch 2 within 10 s"]


async def test_the_end_of_a_later_batch_does_not_start_the_clock_for_a_client_that_reads_nothing() -> None:
    group = Group(in_flight=3)
    group.finish()
    group.send(b"x")
    group.send(b"y")
    for _ in range(AHEAD):
        group.chunk(2, (0, b"c" * BUFFER))
    for rank in (0, 1):  # it failed before it reached the pipeline
        group.error(rank, 3, failure())
    assert group.continued(0) == [3]
    group.clock.advance(100 * TIMEOUT)
    assert group.broken == []


async def test_an_earlier_batch_has_its_limit_anew_once_a_stream_beside_it_has_ended() -> None:
    group = Group(in_flight=3)
    group.finish()
    group.send(b"x")
    group.send(b"y")
    for _ in range(AHEAD):
        group.chunk(3, (0, b"c" * BUFFER))
    group.clock.advance(100 * TIMEOUT)
    group.reply(3, b"")
    group.clock.advance(TIMEOUT - 0.1)
    assert group.broken == []
    group.clock.advance(0.2)
    assert [cause.detail for cause in group.broken] == ["did not finish batch 2 within 10 s"]


def failed_between(stream_ahead: int = AHEAD) -> tuple[Group, Request]:
    """A stream of a pipeline of three whose last stage has failed; rank 1, in front of it, has not heard of it."""
    group = Group(ranks=3, stream_ahead=stream_ahead)
    group.inside = {0, 1, 2}
    group.steps = {0: 1, 1: 1, 2: 1}
    (client,) = group.send(b"a")
    group.chunk(1, (0, b"c" * BUFFER))  # the client does not keep up: no more is granted
    passed_on = failure(needs=(0,), origin=2)
    group.error(2, 1, passed_on)
    group.error(0, 1, passed_on)
    return group, client


async def test_a_stage_that_waits_for_its_grant_when_a_later_one_fails_comes_to_where_it_hears_of_it() -> None:
    """Nobody's chunk would ever bring that grant."""
    group, _ = failed_between(stream_ahead=1)
    (*_, granted) = group.told(Kind.GRANT, rank=1)
    assert granted > 2**40
    group.error(1, 1, failure(needs=(0,), origin=2))
    assert group.continued(1) == [1]
    assert group.broken == []


async def test_a_client_that_reads_what_came_before_a_failure_cancels_no_batch_that_ranks_are_leaving() -> None:
    group, client = failed_between()
    stream = client.reply.result().stream
    assert stream is not None
    assert len(await stream.take(1)) == 1
    assert group.told(Kind.CANCEL) == []
    group.inside = set()
    group.clock.advance(GRACE / 2)
    assert group.continued(1) == [1]
    assert [kind for kind, _ in group.events] == [EventKind.HANDLER_ERROR]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_a_failure_at_the_very_step_behind_which_a_stream_was_cancelled_is_in_step(
    order: tuple[int, ...],
) -> None:
    """The stage in front of the one that failed comes to the end of what was granted, and hears of no failure."""
    group = Group(ranks=3)
    group.inside = {0, 1, 2}
    group.steps = {0: 1, 1: 1, 2: 1}
    (client,) = group.send(b"a")
    group.chunk(1, (0, b"c"))
    assert client.stream is not None
    client.stream.mute()
    assert group.told(Kind.CANCEL) == [AHEAD]
    for rank in order:
        assert group.continued(0) == []
        if rank == 1:
            cancelled(group, rank, 1)
        else:
            group.error(rank, 1, failure(needs=(0,), origin=2))
    assert [group.continued(rank) for rank in range(3)] == [[1]] * 3
    assert group.broken == []
