"""asyncCommunication over an in-memory link: several requests under way on one rank, each for itself."""

import pytest

from minserve.dispatch.request import Request
from minserve.errors import DeadlineExceeded, HandlerError, ResponseTimeout
from minserve.telemetry.events import EventKind
from minserve.wire.frames import Kind
from minserve.worker.blame import What
from tests.unit.worker.broadcasts import FIRST, GRACE, TIMEOUT, Group, body_of, error_of, failure

pytestmark = pytest.mark.asyncio


def group_of(in_flight: int = 3) -> Group:
    return Group(ranks=1, in_flight=in_flight, any_order=True)


def warm() -> Group:
    """The limit of the first batch no longer holds."""
    group = group_of()
    group.finish()
    return group


def cancels(group: Group) -> list[int]:
    return [frame.seq for frame in group.links[0].frames if frame.kind is Kind.CANCEL]


def ended(group: Group, seq: int) -> None:
    """The rank says that a cancelled task has ended."""
    group.error(0, seq, failure("cancelled", "", "", (0,)))


async def test_answers_in_any_order_each_free_a_place() -> None:
    group = group_of()
    clients: list[Request] = [group.send(name)[0] for name in (b"a", b"b", b"c")]
    assert not group.broadcast.has_place()
    for seq, body in ((2, b"B"), (3, b"C"), (1, b"A")):
        group.reply(seq, body)
        assert group.broadcast.has_place()
    assert [body_of(client) for client in clients] == [b"A", b"B", b"C"]
    assert (group.free, group.broadcast.replied) == (3, 3)


async def test_a_request_that_takes_too_long_is_cancelled_and_the_others_go_on() -> None:
    group = warm()
    (slow,) = group.send(b"")
    group.clock.advance(TIMEOUT / 2)
    (later,) = group.send(b"")
    group.clock.advance(TIMEOUT / 2)
    error = error_of(slow)
    assert isinstance(error, ResponseTimeout)
    assert "batch 2 was not finished within 10 s and is cancelled" in str(error)
    assert (cancels(group), group.broken) == ([2], [])
    assert error_of(later) is None
    ended(group, 2)
    group.reply(3, b"ok")
    assert body_of(later) == b"ok"
    assert not group.broadcast.busy
    group.clock.advance(10 * TIMEOUT)
    assert group.broken == []


async def test_each_request_has_its_limit_from_when_it_was_sent() -> None:
    """Where order matters a batch behind others has not begun; here it has."""
    group = warm()
    group.send(b"")
    group.clock.advance(TIMEOUT / 2)
    (second,) = group.send(b"")
    group.clock.advance(TIMEOUT / 2 - 0.1)
    group.reply(2, b"")
    group.clock.advance(TIMEOUT / 2)
    assert cancels(group) == []
    group.clock.advance(0.1)
    assert cancels(group) == [3]
    assert isinstance(error_of(second), ResponseTimeout)


async def test_a_task_that_does_not_end_when_it_is_cancelled_fails_the_worker() -> None:
    group = warm()
    group.send(b"")
    group.clock.advance(2 * TIMEOUT - 0.1)
    assert group.broken == []
    group.clock.advance(0.1)
    (cause,) = group.broken
    assert cause.what is What.SILENCE


async def test_the_first_ones_may_take_longer() -> None:
    group = group_of()
    group.send(b"")
    group.clock.advance(FIRST - 0.1)
    assert cancels(group) == []
    group.clock.advance(0.1)
    assert cancels(group) == [1]


@pytest.mark.parametrize("how", ["left", "deadline"])
async def test_a_request_that_nobody_waits_for_is_cancelled_also_without_a_stream(how: str) -> None:
    group = warm()
    (request,) = group.send(b"")
    group.broadcast.look()
    assert cancels(group) == []
    group.clock.advance(TIMEOUT - 1)
    if how == "left":
        request.reply.cancel()
    else:
        request.fail(DeadlineExceeded("too late"))
    group.broadcast.look()
    group.broadcast.look()
    assert cancels(group) == [2]
    group.clock.advance(TIMEOUT - 0.1)  # its task may need a while to end
    assert group.broken == []
    ended(group, 2)
    assert not group.broadcast.busy
    assert group.events == [(EventKind.STREAM_CANCELLED, 0)]


async def test_an_answer_that_crosses_with_the_cancel_is_dropped() -> None:
    group = warm()
    (request,) = group.send(b"")
    request.reply.cancel()
    group.broadcast.look()
    group.reply(2, b"late")
    assert not group.broadcast.busy
    assert group.broken == []


async def test_streams_beside_each_other_have_grants_of_their_own() -> None:
    group = warm()
    first, second = group.send(b"")[0], group.send(b"")[0]
    for step in range(1, 4):
        group.chunk(3, (0, b"c"), step=step)
    group.chunk(2, (0, b"d"), step=1)
    grants = [frame.seq for frame in group.links[0].frames if frame.kind is Kind.GRANT]
    assert set(grants) == {3}
    assert second.stream is not None
    second.stream.mute()
    assert cancels(group) == [3]
    group.reply(2, b"end")
    assert first.stream is not None
    assert [await first.stream.take(1) for _ in range(3)] == [[b"d"], [b"end"], []]


async def test_a_failure_is_its_own_requests_alone() -> None:
    group = warm()
    bad, good = group.send(b"")[0], group.send(b"")[0]
    group.error(0, 2, failure(needs=(0,)))
    group.clock.advance(GRACE)
    assert isinstance(error_of(bad), HandlerError)
    assert group.broadcast.has_place()
    group.reply(3, b"ok")
    assert body_of(good) == b"ok"
    assert group.broken == []
