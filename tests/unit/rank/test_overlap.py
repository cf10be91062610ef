"""A rank of the first stage with several batches under way, over a real pair of sockets. The later stages are a queue."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minserve.rank import overlap
from minserve.rank.order import Ticket
from minserve.wire.frames import Kind
from minserve.wire.messages import Failure, Loaded, unpack
from tests.unit.rank.rig import SHUTDOWN, Peer, batch, probe, resume, words

# `run` is what a pipeline does on its first stage: `line` has what went to the later stages, and what comes back.
PIPELINE = """
    import minserve, queue, threading
    from minserve.rank import overlap, streaming
    from minserve.rank.order import Ticket
    from tests.unit.rank.test_overlap import LINE, Came, settle_in
    overlap.offer(overlap.Plan(3, True, lambda: settle_in))
    def run(value, issued=0):
        current = streaming.current()
        current.runs += 1
        ticket = Ticket(current.seq, current.runs)
        LINE.sent.put((ticket, value))
        came = overlap.active().await_result(ticket, issued, LINE.back.get)
        if isinstance(came.value, Exception):
            raise came.value
        return came.value
"""
# Keeps what it needs behind `run` on itself and in the context, and does what the body says in front of `run` or behind it.
KEEPS = """
    class Model:
        def initialize(self, context):
            self.context = context
            self.begun = self.answered = 0
        def handle(self, data, context):
            self.name = bytes(data[0]["body"]).decode()
            self.begun += 1
            if self.name == "fails before":
                raise LookupError(self.name)
            result = run(self.name)
            if self.name == "fails behind":
                raise LookupError(self.name)
            if self.name == "again":
                result += " " + run("again")
            self.answered += 1
            assert self.context.get_request_id(0) == context.get_request_id(0) == "r0"
            assert context is not self.context
            self.context.set_response_header(0, "name", self.name)
            return [f"{self.name}: {result}; {self.begun} begun, {self.answered} answered"]
"""


@dataclass
class Came:
    ticket: Ticket
    value: object


class Line:
    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[tuple[Ticket, str]] = queue.SimpleQueue()
        self.back: queue.SimpleQueue[Came] = queue.SimpleQueue()

    def next(self) -> tuple[Ticket, str]:
        """What goes to the next stage: seq and run, and the value."""
        return self.sent.get(timeout=60)

    def give(self, seq: int, value: object, run: int = 1) -> None:
        self.back.put(Came(Ticket(seq, run), value))


LINE = Line()
SETTLED: list[str] = []


def settle_in() -> None:
    SETTLED.append("a thread")


Serve = Callable[..., Peer]


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    fresh = Line()
    monkeypatch.setattr(f"{__name__}.LINE", fresh)
    SETTLED.clear()
    return fresh


@pytest.fixture
def serve(model_dir: Path, line: Line) -> Iterator[Serve]:
    """Starts a rank, which has its first batch behind it unless told not to."""
    started: list[Peer] = []

    def start(source: str, warm: bool = True, **options: Any) -> Peer:
        peer = Peer(model_dir, PIPELINE + source, 2, **options)
        started.append(peer)
        if warm:
            peer.give(batch(1, b"warm"))
            line.next()
            line.give(1, "W")
            assert peer.next().kind is Kind.REPLY
        return peer

    yield start
    for peer in started:
        peer.close()
    assert overlap.active() is None
    assert not started or SETTLED


def test_the_next_batch_begins_while_one_waits_and_each_has_what_it_has_set(serve: Serve, line: Line) -> None:
    peer = serve(KEEPS)
    assert unpack(Loaded, peer.loaded.meta).in_flight == 3
    peer.give(batch(2, b"a"), batch(3, b"b"), batch(4, b"c"))
    assert [line.next() for _ in "abc"] == [((2, 1), "a"), ((3, 1), "b"), ((4, 1), "c")]
    line.give(2, "A")
    assert words([peer.next()]) == ["REPLY 2 a: A; 2 begun, 2 answered"]
    line.give(3, "B")
    line.give(4, "C")
    answers = words([peer.next(), peer.next()])
    assert answers == ["REPLY 3 b: B; 3 begun, 3 answered", "REPLY 4 c: C; 4 begun, 4 answered"]
    peer.give(SHUTDOWN)
    assert peer.rank.result() == 0
    assert [entry for entry in peer.slot.log if "received" in entry] == [f"received {seq}" for seq in (1, 2, 3, 4)]
    assert peer.slot.log[-1] == "finished 4"


def test_the_first_batch_and_a_probe_are_alone(serve: Serve, line: Line) -> None:
    peer = serve(KEEPS + "\n        def probe(self):\n            return run('probe') == 'P'\n", warm=False)
    for seq, frame, name in ((1, batch(1, b"a"), "a"), (3, probe(3), "probe")):
        peer.give(frame, batch(seq + 1, b"next"))
        assert line.next() == ((seq, 1), name)
        assert line.sent.empty()
        line.give(seq, "P")
        assert peer.next().seq == seq
        line.next()
        assert line.sent.empty()
        line.give(seq + 1, "N")
        assert peer.next().seq == seq + 1


def test_a_further_run_goes_out_with_the_next_number(serve: Serve, line: Line) -> None:
    peer = serve(KEEPS)
    peer.give(batch(2, b"again"), batch(3, b"b"))
    line.next(), line.next()
    line.give(2, "A")
    assert line.next() == ((2, 2), "again")
    line.give(2, "B", run=2)
    assert words([peer.next()]) == ["REPLY 2 again: A B; 2 begun, 2 answered"]
    line.give(3, "C")
    assert words([peer.next()]) == ["REPLY 3 b: C; 3 begun, 3 answered"]


def test_what_is_set_on_an_object_of_several_names_is_each_batchs_own(serve: Serve, line: Line) -> None:
    peer = serve("""
    class Service:
        pass
    service = another_name = Service()
    def handle(data, context):
        if data is None:
            return
        service.name = bytes(data[0]["body"]).decode()
        run(service.name)
        if service.name != "warm":
            run(service.name)
        return [service.name]
    """)
    peer.give(batch(2, b"a"), batch(3, b"b"))
    line.next(), line.next()
    for seq, name in ((2, "a"), (3, "b")):
        line.give(seq, "")
        assert line.next() == ((seq, 2), name)
    for seq, name in ((2, "a"), (3, "b")):
        line.give(seq, "", run=2)
        assert words([peer.next()]) == [f"REPLY {seq} {name}"]


def test_a_failure_leaves_earlier_batches_alone_and_later_ones_wait_for_continue(serve: Serve, line: Line) -> None:
    peer = serve(KEEPS)
    peer.give(batch(2, b"a"), batch(3, b"fails before"), batch(4, b"c"))
    assert line.next() == ((2, 1), "a")
    error = peer.next()
    assert (error.kind, error.seq, unpack(Failure, error.meta).text) == (Kind.ERROR, 3, "fails before")
    line.give(2, "A")
    assert words([peer.next()]) == ["REPLY 2 a: A; 2 begun, 2 answered"]
    assert line.sent.empty()
    peer.give(resume(3))
    assert line.next() == ((4, 1), "c")

    peer.give(batch(5, b"d"))
    assert line.next() == ((5, 1), "d")
    line.give(4, LookupError("a later stage"))
    line.give(5, "D")
    error = peer.next()
    assert (error.kind, error.seq, unpack(Failure, error.meta).text) == (Kind.ERROR, 4, "a later stage")
    peer.give(resume(4))
    assert words([peer.next()]) == ["REPLY 5 d: D; 5 begun, 3 answered"]
    peer.give(batch(6, b"fails behind"))
    line.next()
    line.give(6, "F")
    assert unpack(Failure, peer.next().meta).collectives == 0
    peer.give(resume(6), SHUTDOWN)
    assert peer.rank.result() == 0
    assert peer.slot.log[-1] == "finished 6"


@pytest.mark.parametrize(
    "where",
    [
        "[]; t = threading.Thread(target=lambda: out.append(run(name))); t.start(); t.join(); return out",
        "asyncio.run(outer(name)); return [told]",
    ],
)
def test_where_none_can_pause_batches_go_one_after_the_other(serve: Serve, line: Line, where: str) -> None:
    source = f"""
    import asyncio
    async def outer(name):
        return run(name)
    def handle(data, context):
        if data is None: return
        name = bytes(data[0]["body"]).decode()
        out = told = {where}
"""
    peer = serve(source)
    peer.give(batch(2, b"a"), batch(3, b"b"))
    for seq, name in ((2, "a"), (3, "b")):
        assert line.next() == ((seq, 1), name)
        assert line.sent.empty()
        line.give(seq, name.upper())
        assert words([peer.next()]) == [f"REPLY {seq} {name.upper()}"]


# `issued` counts for the collectives that a handler issues; a body names where it does: in front of `run`, behind it.
TALKS = """
    def handle(data, context):
        if data is None: return
        where = bytes(data[0]["body"]).decode()
        COUNT[0] += "front" in where
        result = run(where, COUNT[0])
        COUNT[0] += "behind" in where
        if "again" in where: run(where, COUNT[0])
        return [result]
"""
COUNT = [0]


@pytest.mark.parametrize("always", [True, False])
def test_collectives_in_front_of_a_run_never_pass_those_behind_an_earlier_one(
    serve: Serve, line: Line, monkeypatch: pytest.MonkeyPatch, always: bool
) -> None:
    monkeypatch.setattr(overlap, "issued_collectives", lambda: COUNT[0])
    peer = serve("    from tests.unit.rank.test_overlap import COUNT\n" + TALKS, warm=False)
    bodies = [b"front behind"] * 3 if always else [b"", b"behind", b"front"]
    peer.give(*(batch(seq, body) for seq, body in enumerate(bodies, 1)))
    line.next()
    assert line.sent.empty(), "the first batch is alone"
    line.give(1, "1")
    assert peer.next().kind is Kind.REPLY
    line.next()
    if always:
        assert line.sent.empty(), "it has shown that it uses both"
    else:
        line.next()
    line.give(2, "2")
    answer = peer.next()
    assert (answer.kind, answer.seq) == (Kind.REPLY if always else Kind.ERROR, 2)
    if not always:
        assert "batch 2 used collectives behind Pipeline.run, after batch 3" in unpack(Failure, answer.meta).text


def test_collectives_in_front_of_several_runs_do_not_wait_for_a_further_run_of_an_earlier_batch(
    serve: Serve, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "issued_collectives", lambda: COUNT[0])
    peer = serve("    from tests.unit.rank.test_overlap import COUNT\n" + TALKS, warm=False)
    peer.give(*(batch(seq, b"front again") for seq in (1, 2, 3)))
    for seq in (1, 2, 3):
        for run in (1, 2):
            assert line.next() == ((seq, run), "front again")
            assert line.sent.empty()
            line.give(seq, "R", run)
        assert peer.next().seq == seq
        serving = overlap.active()
        assert serving is not None
        assert serving._alone_because, "the first batch has shown it"


def test_handlers_with_an_event_loop_or_told_to_do_otherwise_are_served_as_ever(serve: Serve, line: Line) -> None:
    SETTLED.append("not needed")
    for source, options in (("    async def handle(data, context): return [b'']", {}), (KEEPS, {"in_flight": 1})):
        overlap._plans.clear()
        peer = serve(source, warm=False, **options)
        assert unpack(Loaded, peer.loaded.meta).in_flight == 0
        peer.give(SHUTDOWN)
        assert peer.rank.result() == 0


def test_the_configured_number_is_passed_back(serve: Serve) -> None:
    assert unpack(Loaded, serve(KEEPS, in_flight=7).loaded.meta).in_flight == 7


def test_what_flies_out_of_a_batch_ends_the_rank(serve: Serve, line: Line) -> None:
    peer = serve("    def handle(data, context): data and (run('x'), exit(3))", warm=False)
    peer.give(batch(1, b"a"))
    line.give(1, "A")
    with pytest.raises(SystemExit):
        peer.rank.result()


def test_a_gap_in_the_numbers_ends_the_rank(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    peer = serve(KEEPS)
    peer.give(batch(3, b"a"))
    assert peer.rank.result() == 1
    assert "rank 0 stops: got batch 3 after batch 1" in capfd.readouterr().err
