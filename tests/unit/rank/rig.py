"""A rank without a process or a socket: frames in, a log of what came and went, and real encoding in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from minserve.rank.connection import Connection, Disconnected
from minserve.rank.context import Context
from minserve.rank.process import Launch
from minserve.wire.frames import FROM_RANK, FROM_SERVER, Frame, FrameReader, Kind
from minserve.wire.messages import (
    Answer,
    Answers,
    Batch,
    Buffer,
    Failure,
    Load,
    Message,
    Part,
    RequestMeta,
    Shutdown,
    pack,
    pack_with_body,
    split_body,
    unpack,
)
from tests.fakes import feed


class FakeConnection(Connection):
    """Hands out the frames it was given, then is disconnected. `log` has one word for each frame, "<" came, ">" went."""

    def __init__(self, frames: Iterable[Frame] = ()) -> None:
        self.incoming = deque(frames)
        self.sent: list[Frame] = []
        self.log: list[str] = []
        self._wire = FrameReader(2**31, FROM_RANK)

    def receive(self) -> Frame:
        if not self.incoming:
            raise Disconnected
        frame = self.incoming.popleft()
        self.log.append(f"<{frame.kind.name} {frame.seq}")
        return frame

    def send(self, kind: Kind, message: Message, seq: int = 0) -> None:
        self._take([pack(kind, message, seq)])

    def send_with_body(self, kind: Kind, message: Message, bodies: list[Buffer], seq: int) -> None:
        self._take(pack_with_body(kind, message, bodies, seq))

    def _take(self, pieces: list[Buffer]) -> None:
        (frame,) = feed(self._wire, b"".join(pieces))
        self.sent.append(frame)
        self.log.append(f">{frame.kind.name} {frame.seq}")

    def of(self, kind: Kind) -> list[Frame]:
        return [frame for frame in self.sent if frame.kind is kind]

    def failure(self, kind: Kind = Kind.ERROR) -> Failure:
        """The only one that was reported."""
        (frame,) = self.of(kind)
        return unpack(Failure, frame.meta)

    def answers(self, kind: Kind = Kind.REPLY) -> list[list[tuple[int, bytes]]]:
        """(index, body) of each answer, frame by frame."""
        return [[(answer.index, body) for answer, body in parts(frame)] for frame in self.of(kind)]


def parts(frame: Frame) -> list[tuple[Answer, bytes]]:
    """The answers of a REPLY or CHUNK with their bodies."""
    metas = unpack(Answers, frame.meta).answers
    bodies = split_body(frame.body, (meta.length for meta in metas))
    return [(meta, bytes(body)) for meta, body in zip(metas, bodies, strict=True)]


def launch(rank: int = 0, world_size: int = 2) -> Launch:
    return Launch(rank, rank, world_size, "unix:/nowhere", "w1", "secret", "/nowhere", False)


def frame(kind: Kind, message: Message, seq: int = 0, body: bytes = b"") -> Frame:
    pieces = pack_with_body(kind, message, [body], seq)
    (result,) = feed(FrameReader(2**31, FROM_SERVER), b"".join(pieces))
    return result


def requests(*bodies: bytes, content_type: str = "") -> tuple[RequestMeta, ...]:
    """Metas of requests with one raw body each: ids r0, r1, …"""
    return tuple(
        RequestMeta(f"r{index}", (), (Part("body", content_type, len(body)),)) for index, body in enumerate(bodies)
    )


def batch(seq: int, *bodies: bytes) -> Frame:
    """A batch of raw bodies."""
    return frame(Kind.BATCH, Batch(requests(*bodies)), seq, b"".join(bodies))


def resume(seq: int) -> Frame:
    return Frame(Kind.CONTINUE, 0, seq, bytearray(), bytearray())


def load(model_dir: str, yaml: bytes = b"", gpu: bool = False, reply_done: bool = False) -> Frame:
    return frame(Kind.LOAD, Load("m", "1.0", model_dir, "handler.py", 4, gpu, reply_done), body=yaml)


SHUTDOWN = frame(Kind.SHUTDOWN, Shutdown("over"))


def new_context(*metas: RequestMeta, model_dir: str = "/m") -> Context:
    """A context in the middle of a batch."""
    context = Context("m", model_dir, {}, {}, 4, None, "0")
    context.begin_batch(metas)
    return context
