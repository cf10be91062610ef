import math

import pytest

from minserve.dispatch.request import Reply
from minserve.errors import BadRequest, HandlerError, HandlerOutOfMemory, WireError, WorkerFailed
from minserve.telemetry.events import EventKind
from minserve.wire.frames import PROBE, Frame, Kind
from minserve.wire.messages import Answer, Answers, Batch, Failure, Part, pack, pack_with_body, unpack
from minserve.worker.blame import What
from tests.unit.worker.broadcasts import FIRST, GRACE, TIMEOUT, Group, body_of, error_of, failure, frame_of, request

pytestmark = pytest.mark.asyncio

# ── order ──


async def test_every_rank_gets_the_same_batches_in_the_same_order_numbered_from_one() -> None:
    group = Group(ranks=4, in_flight=8)
    for number in range(5):
        group.send(*(b"%d.%d" % (number, index) for index in range(number % 3 + 1)))
    first = group.links[0].frames
    assert [frame.seq for frame in first] == [1, 2, 3, 4, 5]
    assert [bytes(frame.body) for frame in first] == [b"0.0", b"1.01.1", b"2.02.12.2", b"3.0", b"4.04.1"]
    assert [len(unpack(Batch, frame.meta).parts) for frame in first] == [1, 2, 3, 1, 2]
    assert all(link.frames == first for link in group.links)


@pytest.mark.parametrize("slow", [0, 1, 2])
async def test_a_link_without_room_holds_back_the_batch_from_all_ranks(slow: int) -> None:
    group = Group(ranks=3)
    assert group.broadcast.has_place()
    group.links[slow].has_room = False
    group.broadcast.room_changed()
    assert not group.broadcast.has_place()
    group.links[slow].has_room = True
    group.broadcast.room_changed()
    assert group.broadcast.has_place()


@pytest.mark.parametrize("in_flight", [1, 3])
async def test_no_more_than_in_flight_batches_are_under_way(in_flight: int) -> None:
    group = Group(in_flight=in_flight)
    sent = 0
    while group.broadcast.has_place():
        group.send(b"")
        sent += 1
    assert sent == in_flight
    group.reply(1, b"")
    assert group.free == 1
    assert group.broadcast.has_place()
    assert group.broadcast.busy == (in_flight > 1)


async def test_replies_are_matched_by_seq_not_by_arrival() -> None:
    group = Group(in_flight=3)
    one, two, three = ([*group.send(b"a", b"b")], [*group.send(b"c")], [*group.send(b"d")])
    group.reply(3, b"D")
    group.reply(1, b"A", b"BB")
    group.reply(2, b"")
    assert [body_of(request) for request in [*one, *two, *three]] == [b"A", b"BB", b"", b"D"]
    assert not group.broadcast.busy


async def test_an_answer_keeps_its_status_reason_and_headers() -> None:
    group = Group()
    (client,) = group.send(b"")
    answers = Answers((Answer(0, 2, 418, "I'm a teapot", (("x-a", "1"), ("x-a", "2"))),))
    group.receive(0, frame_of(pack_with_body(Kind.REPLY, answers, [b"ok"], 1)))
    assert client.reply.result() == Reply(418, "I'm a teapot", (("x-a", "1"), ("x-a", "2")), b"ok")


def raw(kind: Kind, seq: int, meta: bytes = b"", body: bytes = b"") -> Frame:
    return Frame(kind, 0, seq, bytearray(meta), bytearray(body))


def reply_frame(answers: list[tuple[int, int]], body: bytes, kind: Kind = Kind.REPLY) -> Frame:
    meta = Answers(tuple(Answer(index, length) for index, length in answers), int(kind is Kind.CHUNK))
    return raw(kind, 1, bytes(frame_of([pack(kind, meta)]).meta), body)


@pytest.mark.parametrize(
    ("rank", "frame", "message"),
    [
        (0, reply_frame([(0, 1)], b"x"), "REPLY with 1 answers to a batch of 2"),
        (0, reply_frame([(0, 1), (1, 1), (2, 0)], b"xy"), "answers requests"),
        (0, reply_frame([(1, 1), (0, 1)], b"xy"), "answers requests"),
        (0, reply_frame([(0, 1), (0, 1)], b"xy"), "answers requests"),
        (0, reply_frame([(-1, 1), (0, 1)], b"xy"), "answers requests"),
        (0, reply_frame([(0, 1), (1, 3)], b"xy"), "reach over"),
        (0, reply_frame([(0, 1), (1, 0)], b"xy"), "add up to 1 bytes"),
        (0, reply_frame([(0, -1), (1, 3)], b"xy"), "reach over"),
        (0, reply_frame([(2, 1)], b"x", Kind.CHUNK), "answers requests"),
        (0, raw(Kind.REPLY, 1, b"\xc1"), "bad Answers message"),
        (0, raw(Kind.REPLY, 0), "REPLY for batch 0, which is not under way"),
        (0, raw(Kind.REPLY, 2), "REPLY for batch 2, which is not under way .last sent: 1"),
        (0, raw(Kind.CHUNK, 2), "CHUNK for batch 2, which is not under way"),
        (1, raw(Kind.DONE, 2), "DONE for batch 2, which is not under way"),
        (1, raw(Kind.ERROR, 2), "ERROR for batch 2, which is not under way"),
        (1, raw(Kind.ERROR, 0), "ERROR for batch 0, which is not under way"),
        (1, reply_frame([(0, 1), (1, 1)], b"xy"), "REPLY from rank 1: only rank 0 answers"),
        (1, reply_frame([(0, 1)], b"x", Kind.CHUNK), "CHUNK from rank 1: only rank 0 answers"),
    ],
)
async def test_a_frame_that_the_protocol_forbids_answers_nobody(rank: int, frame: Frame, message: str) -> None:
    group = Group()
    clients = group.send(b"a", b"b")
    with pytest.raises(WireError, match=message):
        group.receive(rank, frame)
    assert not any(client.reply.done() for client in clients)


async def test_a_second_reply_to_a_batch_is_an_error() -> None:
    group = Group()
    group.send(b"a")
    group.reply(1, b"A")
    with pytest.raises(WireError, match="REPLY for batch 1, which is not under way"):
        group.reply(1, b"again")


async def test_a_late_reply_frees_the_place_and_is_dropped() -> None:
    group = Group()
    (client,) = group.send(b"a")
    client.reply.cancel()
    assert not group.broadcast.has_place()
    group.reply(1, b"A")
    assert group.broadcast.has_place()


@pytest.mark.parametrize("slow", [0, 1])
async def test_a_rank_that_leaves_no_room_for_response_timeout_is_named(slow: int) -> None:
    group = Group()
    group.links[slow].has_room = False
    group.broadcast.room_changed()
    group.clock.advance(TIMEOUT - 0.01)
    group.broadcast.room_changed()  # another link's mark; the limit does not start anew
    assert group.broken == []
    assert group.free == 0
    group.clock.advance(0.01)
    (cause,) = group.broken
    assert (cause.what, str(cause)) == (
        What.SILENCE,
        f"rank {slow} (pid {4000 + slow}) has taken no batch for 10 s",
    )


async def test_room_on_all_links_wakes_the_dispatcher_and_ends_the_limit() -> None:
    group = Group()
    for link in group.links:
        link.has_room = False
        group.broadcast.room_changed()
    group.clock.advance(TIMEOUT / 2)
    group.links[0].has_room = True
    group.broadcast.room_changed()
    assert group.free == 0
    group.links[1].has_room = True
    group.broadcast.room_changed()
    assert group.free == 1
    group.clock.advance(10 * FIRST)
    assert group.broken == []


# ── replyAfter: all ──


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
async def test_reply_after_all_holds_the_answer_until_every_rank_is_done(order: tuple[int, ...]) -> None:
    group = Group(ranks=3, reply_after_all=True)
    (client,) = group.send(b"a")
    for rank in order:
        assert not client.reply.done()
        assert group.free == 0
        if rank == 0:
            group.reply(1, b"A")
        else:
            group.done(rank, 1)
    assert body_of(client) == b"A"
    assert group.free == 1


async def test_reply_after_all_names_the_rank_that_is_behind_when_time_is_up() -> None:
    group = Group(ranks=3, reply_after_all=True)
    group.finish()
    group.send(b"a")
    group.reply(2, b"A")
    group.done(1, 2)
    group.clock.advance(TIMEOUT)
    (cause,) = group.broken
    assert (cause.what, cause.rank) == (What.SILENCE, 2)


@pytest.mark.parametrize("kind", ["refused", "own"])
async def test_reply_after_all_takes_a_late_done_of_a_batch_that_failed_on_rank_0_alone(kind: str) -> None:
    """Refused answers and failures that a pipeline passed on are over for rank 0 before the others say DONE."""
    group = Group(reply_after_all=True)
    (client,) = group.send(b"a")
    group.error(0, 1, failure(kind, needs=(0,)))
    assert isinstance(error_of(client), HandlerError)
    group.done(1, 1)
    assert group.broken == []
    assert group.broadcast.has_place()


# ── exceptions ──


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
async def test_the_same_exception_on_all_ranks_answers_the_clients_and_the_worker_goes_on(
    order: tuple[int, ...],
) -> None:
    group = Group(ranks=3)
    clients = group.send(b"a", b"b")
    for rank in order:
        assert group.continued(0) == []
        group.error(rank, 1, failure(needs=(0, 1, 2), origin=rank))
    for client in clients:
        error = error_of(client)
        assert type(error) is HandlerError
        assert str(error) == "Prediction failed: m/0, rank 0 (pid 4000): ValueError: no such word"
        assert error.status == 503
    assert [group.continued(rank) for rank in range(3)] == [[1], [1], [1]]
    group.clock.advance(10 * FIRST)
    assert group.broken == []
    assert group.broadcast.has_place()


async def test_the_traceback_goes_to_the_log_and_never_to_a_client(caplog: pytest.LogCaptureFixture) -> None:
    group = Group()
    (client,) = group.send(b"a")
    for rank in (0, 1):
        group.error(rank, 1, failure())
    assert "Traceback ..." in caplog.text
    assert "handler.py:3" in caplog.text
    assert "Traceback" not in str(error_of(client))


async def test_a_handlers_own_status_reaches_the_client() -> None:
    group = Group()
    (client,) = group.send(b"a")
    for rank in (0, 1):
        group.error(rank, 1, failure(status=422))
    error = error_of(client)
    assert isinstance(error, HandlerError)
    assert error.status == 422
    assert HandlerError.status == 503


async def test_out_of_memory_on_all_ranks_is_a_507() -> None:
    group = Group()
    (client,) = group.send(b"a")
    for rank in (0, 1):
        group.error(rank, 1, failure("memory", "OutOfMemoryError"))
    assert isinstance(error_of(client), HandlerOutOfMemory)
    assert group.broken == []


async def test_each_doubt_has_a_grace_of_its_own() -> None:
    group = Group()
    for seq in (1, 2):
        group.send(b"a")
        group.error(0, seq, failure())
        group.clock.advance(GRACE * 0.75)
        assert group.broken == [], "the first batch's grace has ended with its doubt"
        if seq == 1:
            group.error(1, seq, failure())
    group.clock.advance(GRACE * 0.25)
    assert [cause.rank for cause in group.broken] == [0]


@pytest.mark.parametrize("answered", [True, False])
async def test_a_batch_in_step_takes_no_other_batch_out_of_doubt(answered: bool) -> None:
    """With a pipeline rank 1 may be a batch ahead of what rank 0 has reported."""
    group = Group(in_flight=2)
    group.send(b"a")
    group.send(b"b")
    group.error(1, 2, failure(origin=1))
    group.error(0, 1, failure("own", "KeyError", needs=(0,), origin=1))
    assert group.continued(0) == [1]
    assert not group.broadcast.has_place()
    if answered:
        group.reply(2, b"B")
    else:
        group.clock.advance(GRACE)
    assert [(cause.what, cause.rank) for cause in group.broken] == [(What.EXCEPTION, 1)]


async def test_the_grace_is_for_ranks_that_have_begun_the_batch() -> None:
    """One that is still at an earlier batch may come to say the same, however long that takes it."""
    group = Group(in_flight=2)
    group.send(b"a")
    (client,) = group.send(b"b")
    group.behind = {1}
    group.error(0, 2, failure())
    group.clock.advance(3 * GRACE)
    assert group.broken == []
    group.behind = set()
    group.clock.advance(GRACE / 2)
    assert group.broken == []
    group.error(1, 2, failure())
    assert group.continued(1) == [2]
    assert isinstance(error_of(client), HandlerError)
    group.error(0, 1, failure())
    group.clock.advance(GRACE)
    assert [cause.rank for cause in group.broken] == [0]


async def test_a_failure_on_its_way_through_the_pipeline_is_no_doubt_until_the_batchs_own_limit() -> None:
    """The first stage reports it when it is through with the batch that it works on."""
    group = Group(ranks=4, in_flight=2)
    group.finish()
    (client,) = group.send(b"a")
    passed_on = failure(needs=(0, 1), origin=2)
    group.error(2, 2, passed_on)
    group.clock.advance(TIMEOUT - 0.1)
    assert group.broken == []
    group.error(0, 2, passed_on)
    group.error(1, 2, passed_on)
    assert isinstance(error_of(client), HandlerError)
    group.send(b"b")
    group.error(2, 3, passed_on)
    group.error(0, 3, passed_on)
    group.clock.advance(GRACE)
    assert len(group.broken) == 1, "the other rank of the first stage is elsewhere"


@pytest.mark.parametrize("rank", [0, 1])
async def test_an_exception_on_one_rank_breaks_the_worker_after_the_grace_and_names_it(rank: int) -> None:
    group = Group()
    (client,) = group.send(b"a")
    group.error(rank, 1, failure(origin=rank))
    assert not group.broadcast.has_place(), "while it is in doubt no batch goes out"
    group.clock.advance(GRACE - 0.01)
    assert group.broken == []
    group.clock.advance(0.01)
    (cause,) = group.broken
    assert (cause.what, cause.rank, cause.pid) == (What.EXCEPTION, rank, 4000 + rank)
    assert str(cause) == f"rank {rank} (pid {4000 + rank}) raised ValueError: no such word"
    assert not client.reply.done(), "the group answers, once it has looked at the deaths, too"
    assert [group.continued(rank) for rank in (0, 1)] == [[], []]


async def test_an_exception_on_rank_1_after_rank_0_has_replied_breaks_the_worker_at_once() -> None:
    group = Group()
    (client,) = group.send(b"a")
    group.reply(1, b"A")
    group.error(1, 1, failure(origin=1))
    assert [cause.rank for cause in group.broken] == [1]
    assert not group.broadcast.has_place()
    assert body_of(client) == b"A"


async def test_a_reply_after_another_ranks_exception_breaks_the_worker_at_once() -> None:
    group = Group()
    group.send(b"a")
    group.error(1, 1, failure(origin=1))
    group.reply(1, b"A")
    assert [cause.rank for cause in group.broken] == [1]
    assert not group.broadcast.has_place()


@pytest.mark.parametrize(
    ("reports", "culprit"),
    [
        ([failure(), failure(type_name="KeyError")], 0),
        ([failure(), failure(place="handler.py:9")], 0),
        ([failure("collective"), failure("collective")], 0),
        ([failure("device"), failure("device")], 0),
        ([failure("collective"), failure("own", place="handler.py:9")], 1),
        ([failure("device"), failure("own")], 0),
        ([failure("collective"), failure("own")], 1),
    ],
)
async def test_exceptions_that_leave_the_ranks_out_of_step_break_the_worker_without_grace(
    reports: list[Failure], culprit: int
) -> None:
    group = Group()
    (client,) = group.send(b"a")
    for rank, report in enumerate(reports):
        assert group.broken == []
        group.error(rank, 1, report)
    assert [cause.rank for cause in group.broken] == [culprit]
    assert not client.reply.done()
    assert group.continued(0) == []


@pytest.mark.parametrize(("rank", "kind"), [(1, "refused"), (1, "chunk")])
async def test_only_rank_0s_answers_can_be_refused(rank: int, kind: str) -> None:
    group = Group()
    group.send(b"a")
    with pytest.raises(WireError, match="only rank 0 answers"):
        group.error(rank, 1, failure(kind, ""))


@pytest.mark.parametrize("origin", [-1, 2])
async def test_a_failure_must_come_from_a_rank_that_there_is(origin: int) -> None:
    group = Group()
    group.send(b"a")
    with pytest.raises(WireError, match=f"ERROR of rank {origin}, of which there are 2"):
        group.error(0, 1, failure(origin=origin))


async def test_a_rank_0_that_fails_again_after_a_refused_answer_breaks_the_worker_and_is_named() -> None:
    group = Group()
    group.send(b"a")
    group.error(0, 1, failure("refused", "Refused"))
    group.error(0, 1, failure())
    assert [(cause.what, cause.rank) for cause in group.broken] == [(What.EXCEPTION, 0)]


@pytest.mark.parametrize("early", [True, False])
async def test_a_failure_that_a_pipeline_passed_on_needs_the_report_of_its_first_stage_only(early: bool) -> None:
    group = Group(ranks=3)
    group.inside = {2}
    (client,) = group.send(b"a")
    passed_on = failure(needs=(0,), origin=2)
    if early:
        group.error(2, 1, passed_on)
        assert not client.reply.done()
    group.error(0, 1, passed_on)
    assert str(error_of(client)) == "Prediction failed: m/0, rank 2 (pid 4002): ValueError: no such word"
    if not early:
        group.error(2, 1, passed_on)
    group.clock.advance(10 * FIRST)
    assert group.broken == []
    assert group.broadcast.has_place()
    assert [group.continued(rank) for rank in range(3)] == [[1]] * 3


@pytest.mark.parametrize("ends", ["leaves", "says the same", "says DONE", "raises something else", "stays"])
async def test_after_a_failure_that_a_pipeline_passed_on_the_others_go_on_when_every_rank_has_left_the_batch(
    ends: str,
) -> None:
    """A stage in front of the one that failed may be in a collective, which must not meet one of the next batch."""
    group = Group(ranks=3, in_flight=2, reply_after_all=ends == "says DONE")
    group.inside = {0, 1, 2}
    (client,) = group.send(b"a")
    passed_on = failure(needs=(0,), origin=2)
    group.error(2, 1, passed_on)
    group.error(0, 1, passed_on)
    assert str(error_of(client)) == "Prediction failed: m/0, rank 2 (pid 4002): ValueError: no such word"
    group.clock.advance(GRACE / 2)
    group.broadcast.look()
    assert group.told(Kind.CANCEL) == []
    assert group.continued(0) == []
    assert not group.broadcast.has_place()
    if ends == "leaves":
        group.inside = set()
    elif ends == "says the same":
        group.error(1, 1, passed_on)
        assert group.continued(0) == [1], "at once"
    elif ends == "says DONE":
        group.done(1, 1)
    elif ends == "raises something else":
        group.error(1, 1, failure(type_name="KeyError", origin=1))
    group.clock.advance(GRACE)
    if ends in ("raises something else", "stays"):
        assert [cause.rank for cause in group.broken] == [2]
        assert group.continued(0) == []
    else:
        assert group.broken == []
        assert group.continued(0) == group.continued(1) == [1]
        assert group.broadcast.has_place()
        assert not group.broadcast.busy
    assert group.events == [(EventKind.HANDLER_ERROR, 2)]


async def test_a_late_report_of_another_failure_breaks_the_worker() -> None:
    group = Group()
    group.send(b"a")
    group.error(0, 1, failure(needs=(0,)))
    group.error(1, 1, failure(type_name="KeyError", needs=(0,), origin=1))
    assert [cause.rank for cause in group.broken] == [1]


async def test_a_refused_answer_is_the_clients_error_and_no_ranks() -> None:
    group = Group()
    (client,) = group.send(b"a")
    group.error(0, 1, failure("refused", "Refused", needs=()))
    assert isinstance(error_of(client), HandlerError)
    assert group.continued(0) == [], "nobody waits for it: handle had returned"
    assert group.broken == []
    assert group.broadcast.has_place()


async def test_a_failed_batch_leaves_the_others_in_flight_alone() -> None:
    group = Group(in_flight=2)
    (one,), (two,) = group.send(b"a"), group.send(b"b")
    for rank in (0, 1):
        group.error(rank, 1, failure())
    group.reply(2, b"B")
    assert isinstance(error_of(one), HandlerError)
    assert body_of(two) == b"B"


async def test_the_end_of_the_group_answers_everything_in_flight_and_stops_the_clock() -> None:
    group = Group(in_flight=3)
    clients = [*group.send(b"a", b"b"), *group.send(b"c")]
    group.error(1, 1, failure())
    gone = WorkerFailed("rank 1 died")
    group.broadcast.fail_all(gone, begun=2)
    assert [error_of(client) for client in clients] == [gone] * 3
    group.clock.advance(10 * FIRST)
    assert group.broken == []
    assert not group.broadcast.busy


async def test_what_no_rank_had_begun_goes_back_once_the_ranks_are_gone() -> None:
    group = Group(in_flight=4)
    for name in (b"a", b"b", b"c", b"d"):
        group.send(name)
    group.broadcast.fail_all(WorkerFailed("rank 1 died"), begun=2)
    assert group.lost == [(True, [b"a", b"b"])]
    assert not group.broadcast.has_place()
    group.reply(3, b"C")  # rank 0 lives on until it is killed: whoever is still to be answered is not answered twice
    group.broadcast.fail_rest(WorkerFailed("rank 1 died"), begun=3)
    assert group.lost[1:] == [(True, [b"c"]), (False, [b"d"])]
    group.broadcast.fail_rest(WorkerFailed("it was stopped"), begun=3)
    assert len(group.lost) == 3


async def test_the_oldest_batch_counts_as_begun_for_it_may_be_what_the_ranks_died_of() -> None:
    group = Group(in_flight=2)
    group.send(b"a")
    group.send(b"b")
    group.broadcast.fail_rest(WorkerFailed("rank 1 died"), begun=0)
    assert group.lost == [(True, [b"a"]), (False, [b"b"])]


async def test_short_batches_are_sent_ahead_and_leave_with_those_of_the_same_turn() -> None:
    group = Group(in_flight=None)
    group.send(b"a")
    assert not group.broadcast.has_place(), "how long a batch takes is not known yet"
    group.reply(1, b"", seconds=1e-5)
    sent = 0
    while group.broadcast.has_place(full=sent < 5):
        group.send(b"")
        sent += 1
    assert sent == 5, "a batch that is not full goes ahead of none"
    assert [link.waited for link in group.links] == [4, 4], "the first leaves at once: its ranks are idle"
    assert [link.flushes for link in group.links] == [0, 0]
    group.clock.advance()
    assert [link.flushes for link in group.links] == [1, 1]


# ── time ──


async def test_the_first_batch_has_its_own_limit() -> None:
    group = Group()
    group.send(b"a")
    group.clock.advance(FIRST - 0.01)
    assert group.broken == []
    group.clock.advance(0.01)
    (cause,) = group.broken
    assert str(cause) == "rank 0 (pid 4000) did not finish batch 1 within 50 s"


async def test_a_batch_that_is_not_answered_within_response_timeout_breaks_the_worker() -> None:
    group = Group()
    group.finish()
    (client,) = group.send(b"a")
    group.clock.advance(TIMEOUT - 0.01)
    assert group.broken == []
    group.clock.advance(0.01)
    (cause,) = group.broken
    assert cause.what is What.SILENCE
    assert str(cause) == "rank 0 (pid 4000) did not finish batch 2 within 10 s"
    assert not client.reply.done(), "the group answers"


async def test_an_exception_explains_a_silence() -> None:
    group = Group(ranks=3)
    group.finish()
    group.send(b"a")
    group.clock.advance(TIMEOUT - GRACE / 2)
    group.error(1, 2, failure(needs=(0, 1, 2), origin=1))
    group.clock.advance(GRACE / 2)
    assert [(cause.what, cause.rank) for cause in group.broken] == [(What.EXCEPTION, 1)]


async def test_a_batch_behind_others_counts_from_when_it_becomes_the_oldest() -> None:
    group = Group(in_flight=2)
    group.finish()
    group.send(b"a")
    group.send(b"b")
    group.clock.advance(TIMEOUT - 1)
    group.reply(2, b"A")
    group.clock.advance(TIMEOUT - 1)
    assert group.broken == []
    group.clock.advance(1)
    assert [str(cause) for cause in group.broken] == ["rank 0 (pid 4000) did not finish batch 3 within 10 s"]


async def test_a_batch_that_is_over_before_an_earlier_one_leaves_its_ranks_their_time() -> None:
    group = Group(in_flight=3)
    for name in (b"a", b"b", b"c"):
        group.send(name)
    over = []
    for seq in (2, 1, 3):  # in a pipeline the handler may answer one without a run
        group.reply(seq, b"A")
        over.append(group.broadcast.replied)  # the watchdog asks the ranks for so much
    assert over == [0, 2, 3]


async def test_each_chunk_of_a_stream_starts_the_limit_anew() -> None:
    group = Group()
    group.finish()
    group.send(b"a")
    for _ in range(5):
        group.clock.advance(TIMEOUT - 0.01)
        group.chunk(2, (0, b"x"))
    assert group.broken == []
    group.clock.advance(TIMEOUT)
    assert [cause.what for cause in group.broken] == [What.SILENCE]


async def test_chunks_reach_the_request_that_they_are_for_and_the_reply_ends_the_streams() -> None:
    group = Group()
    one, two = group.send(b"a", b"b")
    group.chunk(1, (1, b"two"))
    assert not one.reply.done()
    assert two.deadline == math.inf, "from the first chunk on responseTimeout watches"
    group.chunk(1, (0, b"one"), (1, b"zwei"))
    assert group.broadcast.busy
    group.reply(1, b"", b"drei")
    received = []
    for client in (one, two):
        stream = client.reply.result().stream
        assert stream is not None
        chunks: list[bytes] = []
        while some := await stream.take(1):
            chunks += map(bytes, some)
        received.append(chunks)
    assert received == [[b"one"], [b"two", b"zwei", b"drei"]]
    assert group.broadcast.has_place()


async def test_a_stream_whose_worker_ends_breaks_off_after_what_has_come() -> None:
    group = Group()
    (client,) = group.send(b"a")
    group.chunk(1, (0, b"x"))
    group.broadcast.fail_all(WorkerFailed("rank 1 died"), begun=1)
    stream = client.reply.result().stream
    assert stream is not None
    assert await stream.take(1) == [b"x"]
    with pytest.raises(WorkerFailed, match="rank 1 died"):
        await stream.take(1)


async def test_a_batch_that_cannot_be_encoded_leaves_no_gap() -> None:
    group = Group()
    odd = request(b"x")
    odd.meta.parts = (Part("body", "image/\udcff", 1),)
    with pytest.raises(UnicodeEncodeError):
        group.broadcast.send([odd])
    assert group.broadcast.has_place()
    group.send(b"a")
    assert [frame.seq for frame in group.links[0].frames] == [1]


async def test_a_batch_whose_headers_no_rank_would_take_is_the_clients_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.worker.broadcast.MAX_META_BYTES", 1000)
    group = Group()
    greedy = request(b"x")
    greedy.meta.headers = ((b"a", b"b" * 1000),)
    with pytest.raises(BadRequest, match="the headers and names of a batch's 1 requests are over 1000 bytes"):
        group.broadcast.send([greedy])
    group.send(b"a")
    assert [frame.seq for frame in group.links[0].frames] == [1]


async def test_a_crowded_link_is_borne_while_the_batch_before_it_has_time_left() -> None:
    """The first batch may compile for longer than responseTimeout; nobody takes batches meanwhile."""
    group = Group(in_flight=2)
    group.send(b"a")
    group.links[1].has_room = False
    group.broadcast.room_changed()
    group.clock.advance(FIRST - 1)
    assert group.broken == []
    group.clock.advance(2)
    assert [cause.detail for cause in group.broken[:1]] == ["did not finish batch 1 within 50 s"]


async def test_an_answer_behind_another_ranks_exception_is_not_sent() -> None:
    group = Group()
    (client,) = group.send(b"a")
    group.error(1, 1, failure(origin=1))
    group.reply(1, b"whatever rank 0 made of it")
    assert not client.reply.done()
    assert [cause.rank for cause in group.broken] == [1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_two_different_failures_are_never_in_step_whichever_comes_last(order: tuple[int, int]) -> None:
    """Rank 0 reports what a pipeline passed on and would do by itself; rank 1 has raised something of its own."""
    reports = {0: failure(type_name="KeyError", needs=(0,)), 1: failure(type_name="ValueError")}
    group = Group()
    group.send(b"a")
    for rank in order:
        group.error(rank, 1, reports[rank])
    assert [cause.rank for cause in group.broken] == [1]
    assert group.continued(0) == ([1] if order == (0, 1) else [])


async def test_a_chunk_behind_another_ranks_exception_is_not_sent() -> None:
    group = Group()
    (client,) = group.send(b"a")
    group.error(1, 1, failure(origin=1))
    group.chunk(1, (0, b"x"))
    assert not client.reply.done()


async def test_the_same_line_after_another_number_of_collectives_is_not_in_step() -> None:
    group = Group()
    group.send(b"a")
    for rank in (0, 1):
        report = failure(origin=rank)
        report.collectives = rank
        group.error(rank, 1, report)
    assert len(group.broken) == 1
    assert group.continued(0) == []


# ── silence beside victims ──


async def test_a_rank_that_says_nothing_is_suspected_before_the_victims_of_its_collective() -> None:
    group = Group(ranks=3)
    group.finish()
    group.send(b"x")
    for rank in (0, 2):
        group.error(rank, 2, failure("collective", "RuntimeError", needs=(0, 1, 2)))
    assert group.broken == []
    group.clock.advance(GRACE)
    (cause,) = group.broken
    assert (cause.what, cause.rank, group.doubtful) == (What.SILENCE, 1, [2])
    assert cause.detail == "was still in batch 2 2 s after its collective failed on rank 0"


async def test_where_all_ranks_report_a_collectives_error_the_first_is_named() -> None:
    group = Group()
    group.finish()
    group.send(b"x")
    group.error(1, 2, failure("collective", "RuntimeError"))
    group.error(0, 2, failure("collective", "RuntimeError"))
    assert [(cause.what, cause.rank) for cause in group.broken] == [(What.COLLECTIVE, 1)]


# ── probes ──


async def test_a_probe_is_a_batch_without_requests_that_every_rank_must_pass() -> None:
    group = Group(ranks=3)
    passed: list[bool] = []
    group.broadcast.probe(lambda: passed.append(True))
    (frame,) = group.links[2].frames
    assert (frame.kind, frame.flags, frame.seq) == (Kind.BATCH, PROBE, 1)
    assert not group.broadcast.has_place()
    group.done(2, 1)
    group.reply(1)
    assert not passed
    group.done(1, 1)
    assert passed == [True]
    assert not group.broadcast.busy
    assert (group.broadcast.batches_done, group.broadcast.replied) == (0, 1)
    group.send(b"x")
    group.clock.advance(FIRST - 0.1)
    assert group.broken == [], "a probe is not the first batch, which may compile"


@pytest.mark.parametrize("others", [(), (0,), (0, 2)])
async def test_a_probe_that_fails_on_any_rank_breaks_the_worker_and_is_named(others: tuple[int, ...]) -> None:
    group = Group(ranks=3)
    group.broadcast.probe()
    for rank in (1, *others):
        group.error(rank, 1, failure(type_name="ProbeFailed", needs=(0, 1, 2)))
    group.clock.advance(GRACE)
    cause = group.broken[0]
    assert (cause.what, cause.rank) == (What.PROBE, 1)
    assert cause.detail == "raised ProbeFailed: no such word in its probe"


# ── what else is told ──


async def test_a_handlers_error_is_an_event_and_so_is_an_answer_that_cannot_be_sent() -> None:
    group = Group()
    group.send(b"x")
    group.error(1, 1, failure())
    assert group.events == []
    group.error(0, 1, failure())
    group.send(b"y")
    group.error(0, 2, failure("refused", ""))
    assert group.events == [(EventKind.HANDLER_ERROR, 0)] * 2


async def test_chunks_that_skip_back_or_go_beyond_the_grant_break_the_protocol() -> None:
    for step in (0, 1, 6):
        group = Group()
        group.send(b"x")
        group.chunk(1, (0, b"c"), step=1)
        with pytest.raises(WireError, match=f"CHUNK of step {step} behind step 1, with 4 granted"):
            group.receive(0, frame_of(pack_with_body(Kind.CHUNK, Answers((Answer(0, 1),), step), [b"c"], 1)))


# ── the first batch ──


async def test_a_first_batch_behind_a_probe_has_its_own_limit_all_the_same() -> None:
    group = Group(in_flight=2)
    group.broadcast.probe()
    group.send(b"x")
    assert (group.broadcast.first_seq, group.broadcast.working) == (2, True)
    group.reply(1)
    group.done(1, 1)
    group.clock.advance(FIRST - 0.1)
    assert group.broken == []
    group.clock.advance(0.2)
    assert [cause.detail for cause in group.broken] == ["did not finish batch 2 within 50 s"]


async def test_a_probe_is_no_work() -> None:
    group = Group()
    group.broadcast.probe()
    assert (group.broadcast.busy, group.broadcast.working) == (True, False)


async def test_an_answer_that_is_held_is_judged_when_it_comes() -> None:
    """Later it would be another rank's DONE that brings the error, and that rank that is blamed."""
    group = Group(reply_after_all=True)
    group.send(b"x")
    with pytest.raises(WireError, match=r"REPLY answers requests \[0, 1\] of a batch of 1"):
        group.reply(1, b"a", b"b")


# ── what is measured ──


def measured(group: Group) -> dict[str, int]:
    meters = group.broadcast._meters
    series = {name: getattr(meters, name).buckets()[-1][1] for name in ("broadcast", "rank0")}
    text = meters._metrics.text()
    return series | {"latencies": len([line for line in text.splitlines() if line.startswith("ts_inference_latency")])}


async def test_a_batch_is_measured_for_each_request_and_only_answers_have_a_latency() -> None:
    group = Group()
    group.send(b"a", b"b", b"c")
    assert measured(group) == {"broadcast": 3, "rank0": 0, "latencies": 0}
    group.reply(1, b"", b"", b"")
    assert measured(group) == {"broadcast": 3, "rank0": 3, "latencies": 1}


async def test_errors_and_late_answers_have_no_latency() -> None:
    group = Group()
    group.send(b"x")
    for rank in range(2):
        group.error(rank, 1, failure())
    (late,) = group.send(b"y")
    late.fail(TimeoutError())
    group.reply(2, b"")
    assert isinstance(error_of(late), TimeoutError)
    assert measured(group) == {"broadcast": 2, "rank0": 1, "latencies": 0}


async def test_a_streams_latency_is_that_of_its_end() -> None:
    group = Group()
    group.send(b"x")
    group.chunk(1, (0, b"first"))
    assert measured(group)["latencies"] == 0
    group.reply(1, b"last")
    assert measured(group)["latencies"] == 1
