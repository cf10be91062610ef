"""A broadcast over in-memory links, for the tests of what it does with batches, streams and silence."""

import asyncio
import math

from minserve.dispatch.request import Request
from minserve.errors import MinServeError
from minserve.telemetry.events import EventKind
from minserve.wire.frames import FROM_RANK, Frame, FrameReader, Kind
from minserve.wire.messages import Answer, Answers, Failure, Part, RequestMeta, Step, pack, pack_with_body, unpack
from minserve.worker.blame import Cause
from minserve.worker.broadcast import Broadcast
from minserve.worker.memory import Memory
from minserve.worker.outstanding import Limits
from tests.fakes import FakeClock, MemoryLink, feed

TIMEOUT, FIRST, GRACE = 10.0, 50.0, 2.0
AHEAD, BUFFER = 4, 10_000  # steps, bytes


class Group:
    """A broadcast over in-memory links, and the frames that its ranks would send."""

    def __init__(
        self,
        ranks: int = 2,
        in_flight: int | None = 1,
        *,
        reply_after_all: bool = False,
        any_order: bool = False,
        stream_ahead: int | None = AHEAD,
        memory: Memory | None = None,
    ) -> None:
        self.clock = FakeClock()
        self.links = [MemoryLink(rank) for rank in range(ranks)]
        self.free = 0
        self.lost: list[tuple[bool, list[bytes]]] = []  # whether a rank had begun, and the bodies
        self._stream = self._step = 0
        self.broken: list[Cause] = []
        self.doubtful: list[int] = []  # the batch that each of them is about
        self.events: list[tuple[EventKind, int]] = []
        self.behind: set[int] = set()  # ranks that are at an earlier batch
        self.inside: set[int] = set()  # ranks that are in their batch, whatever they have reported
        self.steps: dict[int, int] = {}  # by rank: counted in whatever batch is asked for
        limits = Limits(
            *(in_flight, TIMEOUT, FIRST, GRACE, reply_after_all),
            stream_ahead=stream_ahead,
            stream_buffer=BUFFER,
            any_order=any_order,
        )
        self.broadcast = Broadcast(
            *(self.clock, self.links, limits, "m/0", lambda rank, seq: self.steps.get(rank, 0)),
            *(self._freed, self._break, self._lose, self._happen),
            behind=lambda rank, seq: rank in self.behind,
            left=lambda rank, seq: rank not in self.inside,
            memory=memory,
        )

    def _freed(self) -> None:
        self.free += 1

    def _break(self, cause: Cause, seq: int) -> None:
        self.broken.append(cause)
        self.doubtful.append(seq)

    def _lose(self, requests: list[Request], error: MinServeError, begun: bool) -> None:
        self.lost.append((begun, [bytes(request.bodies[0]) for request in requests]))
        for request in requests:
            request.fail(error)

    def _happen(self, kind: EventKind, detail: str, rank: int, pid: int) -> None:
        assert "m/0" in detail
        assert pid == self.links[rank].pid
        self.events.append((kind, rank))

    def send(self, *bodies: bytes) -> list[Request]:
        requests = [request(body) for body in bodies]
        self.broadcast.send(requests)
        return requests

    def receive(self, rank: int, frame: Frame) -> None:
        self.receive_together(rank, frame)

    def receive_together(self, rank: int, *frames: Frame) -> None:
        """Frames that came with one read."""
        for frame in frames:
            self.broadcast.received(self.links[rank], frame)
        self.broadcast.taken()

    def reply(self, seq: int, *bodies: bytes, rank: int = 0, kind: Kind = Kind.REPLY, seconds: float = 0.0) -> None:
        self.receive(rank, reply_frame(seq, *bodies, kind=kind, seconds=seconds))

    def chunk(self, seq: int, *chunks: tuple[int, bytes], step: int = 0) -> None:
        """The next step of a stream, unless it says which."""
        self.receive(0, self.chunk_frame(seq, *chunks, step=step))

    def chunk_frame(self, seq: int, *chunks: tuple[int, bytes], step: int = 0) -> Frame:
        """The frame of it."""
        if self._stream != seq:
            self._stream, self._step = seq, 0
        self._step = step or self._step + 1
        answers = Answers(tuple(Answer(index, len(body)) for index, body in chunks), self._step)
        return frame_of(pack_with_body(Kind.CHUNK, answers, [body for _, body in chunks], seq))

    def done(self, rank: int, seq: int) -> None:
        self.receive(rank, frame_of([pack(Kind.DONE, Answers(()), seq)]))

    def error(self, rank: int, seq: int, failure: Failure) -> None:
        self.receive(rank, frame_of([pack(Kind.ERROR, failure, seq)]))

    def continued(self, rank: int) -> list[int]:
        return [frame.seq for frame in self.links[rank].frames if frame.kind is Kind.CONTINUE]

    def told(self, kind: Kind, rank: int = 0) -> list[int]:
        """The steps of the GRANT or CANCEL frames that a rank got."""
        return [unpack(Step, frame.meta).step for frame in self.links[rank].frames if frame.kind is kind]

    def finish(self, count: int = 1) -> None:
        """Gets the first batches behind it, so that the ordinary limit holds."""
        for _ in range(count):
            self.send(b"warm-up")
            seq = self.links[0].frames[-1].seq
            self.reply(seq, b"")
            for rank in range(1, len(self.links)):
                if self.broadcast.busy:
                    self.done(rank, seq)


def reply_frame(seq: int, *bodies: bytes, kind: Kind = Kind.REPLY, seconds: float = 0.0) -> Frame:
    answers = Answers(tuple(Answer(index, len(body)) for index, body in enumerate(bodies)), seconds=seconds)
    return frame_of(pack_with_body(kind, answers, bodies, seq))


def frame_of(pieces: list[bytes] | list[bytes | bytearray | memoryview]) -> Frame:
    (frame,) = feed(FrameReader(2**31, FROM_RANK), b"".join(map(bytes, pieces)))
    return frame


def request(body: bytes, name: str = "id") -> Request:
    meta = RequestMeta(name, (), (Part("body", "", len(body)),))
    return Request(meta, [body], math.inf, asyncio.get_running_loop().create_future())


def failure(
    kind: str = "own",
    type_name: str = "ValueError",
    place: str = "handler.py:3",
    needs: tuple[int, ...] = (0, 1),
    origin: int = 0,
    status: int = 0,
) -> Failure:
    return Failure(kind, type_name, "no such word", place, "Traceback ...", origin, needs, status)


def body_of(request: Request) -> bytes:
    return bytes(request.reply.result().body)


def error_of(request: Request) -> BaseException | None:
    return request.reply.exception() if request.reply.done() else None
