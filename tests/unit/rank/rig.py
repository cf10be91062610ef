"""A rank without a process or a socket: frames in, a log of what came and went, and real encoding in between."""

from __future__ import annotations

import contextlib
import queue
import socket
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from minserve.errors import WireError
from minserve.rank.connection import Connection, Disconnected
from minserve.rank.context import Context
from minserve.rank.loop import Rank
from minserve.rank.process import Launch
from minserve.wire.board import Slot
from minserve.wire.frames import FROM_RANK, FROM_SERVER, PROBE, Frame, FrameReader, Kind, encode
from minserve.wire.messages import (
    Answer,
    Answers,
    Buffer,
    Failure,
    Load,
    Message,
    Part,
    Progress,
    RequestMeta,
    Shutdown,
    Step,
    new_batch,
    pack,
    pack_with_body,
    split_body,
    unpack,
)
from tests.fakes import feed


class FakeConnection(Connection):
    """Hands out the frames it was given, then is disconnected. `log` has one word for each frame, "<" came, ">" went."""

    def __init__(self, frames: Iterable[Frame] = ()) -> None:
        self.lost = False
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

    def receive_all(self) -> list[Frame]:
        return [self.receive()]

    def send(self, kind: Kind, message: Message, seq: int = 0) -> None:
        self._take([pack(kind, message, seq)])

    def hold(self, kind: Kind, message: Message, seq: int = 0) -> None:
        self.send(kind, message, seq)

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


class PacedConnection(FakeConnection):
    """Hands out a frame, or raises an error, once it is given one; until then whoever reads waits."""

    def __init__(self) -> None:
        super().__init__()
        self._given: queue.SimpleQueue[Frame | Exception] = queue.SimpleQueue()
        self.read = threading.Event()  # somebody is, or was, at it

    def give(self, *items: Frame | Exception) -> None:
        for item in items:
            self._given.put(item)

    def receive(self) -> Frame:
        self.read.set()
        item = self._given.get()
        if isinstance(item, Exception):
            raise item
        return item


class FakeSlot(Slot):
    """Remembers what a rank has shown."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def received(self, seq: int) -> None:
        self.log.append(f"received {seq}")

    def finished(self, seq: int) -> None:
        self.log.append(f"finished {seq}")

    def stepped(self, seq: int, step: int) -> None:
        self.log.append(f"step {step} of {seq}")


T = TypeVar("T")
DEADLINE_S = 60.0  # of what takes a moment, where it goes wrong


class Running(Generic[T]):
    """A call in a thread of its own."""

    def __init__(self, call: Callable[..., T], *args: object) -> None:
        self._call = call
        self._args = args
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call(*self._args)
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """What it returned or raised."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "it hangs"
        if self._error is not None:
            raise self._error
        return self._result


def parts(frame: Frame) -> list[tuple[Answer, bytes]]:
    """The answers of a REPLY or CHUNK with their bodies."""
    metas = unpack(Answers, frame.meta).answers
    bodies = split_body(frame.body, [meta.length for meta in metas])
    return [(meta, bytes(body)) for meta, body in zip(metas, bodies, strict=True)]


def launch(rank: int = 0, world_size: int = 2) -> Launch:
    return Launch(rank, rank, world_size, "unix:/nowhere", "w1", "secret", Path("/nowhere"), False)


def frame(kind: Kind, message: Message, seq: int = 0, body: bytes = b"") -> Frame:
    pieces = pack_with_body(kind, message, [body], seq)
    (result,) = feed(FrameReader(2**31, FROM_SERVER), b"".join(pieces))
    return result


def requests(*bodies: bytes, content_type: str = "") -> tuple[RequestMeta, ...]:
    """Metas of requests with one raw body each: ids r0, r1, …"""
    return tuple(
        RequestMeta(f"r{index}", (), (Part("body", content_type, len(body)),)) for index, body in enumerate(bodies)
    )


def batch(seq: int, *bodies: bytes, grant: int = 8) -> Frame:
    """A batch of raw bodies."""
    return frame(Kind.BATCH, new_batch(requests(*bodies), grant), seq, b"".join(bodies))


def probe(seq: int) -> Frame:
    whole = frame(Kind.BATCH, new_batch(()), seq)
    whole.flags = PROBE
    return whole


def grant(seq: int, step: int) -> Frame:
    return frame(Kind.GRANT, Step(step), seq)


def cancel(seq: int, step: int) -> Frame:
    """`step` is the last one granted."""
    return frame(Kind.CANCEL, Step(step), seq)


def resume(seq: int) -> Frame:
    return Frame(Kind.CONTINUE, 0, seq, bytearray(), bytearray())


def load(
    model_dir: str,
    yaml: bytes = b"",
    gpu: bool = False,
    reply_done: bool = False,
    handler: str = "handler.py",
    **others: Any,
) -> Frame:
    """`others` are fields of LOAD that have a default."""
    return frame(Kind.LOAD, Load("m", "1.0", model_dir, handler, 4, gpu, reply_done, **others), body=yaml)


SHUTDOWN = frame(Kind.SHUTDOWN, Shutdown("over"))


def new_context(*metas: RequestMeta, model_dir: str = "/m") -> Context:
    """A context in the middle of a batch."""
    context = Context("m", model_dir, {}, 4, None, "0")
    context.begin_batch(metas)
    return context


class Peer:
    """A rank that serves in a thread, seen from the server."""

    def __init__(self, model_dir: Path, source: str, world_size: int, **options: Any) -> None:
        (model_dir / "handler.py").write_text(textwrap.dedent(source))
        self._ours, theirs = socket.socketpair()
        self._ours.settimeout(DEADLINE_S)
        self._reader = FrameReader(2**31, FROM_RANK)
        self._read: deque[Frame] = deque()
        self.slot = FakeSlot()
        self._theirs = theirs
        self.rank = Running(Rank(launch(0, world_size), Connection(theirs), self.slot).run)
        self.give(load(str(model_dir), **options))
        self.loaded = self.until(Kind.LOADED)[-1]

    def give(self, *frames: Frame) -> None:
        for one in frames:
            self._ours.sendall(encode(one.kind, one.seq, bytes(one.meta), bytes(one.body), one.flags))

    def next(self) -> Frame:
        while not self._read:
            count = self._ours.recv_into(self._reader.buffer())
            assert count, "the rank has hung up"
            self._read.extend(self._reader.received(count))
        return self._read.popleft()

    def until(self, kind: Kind) -> list[Frame]:
        """The frames up to one of this kind, without PROGRESS."""
        frames = [self.next()]
        while frames[-1].kind is not kind:
            frames.append(self.next())
        return [one for one in frames if one.kind is not Kind.PROGRESS]

    def stage(self) -> str:
        """What the handler reports next."""
        frame = self.next()
        assert frame.kind is Kind.PROGRESS
        return unpack(Progress, frame.meta).stage

    def hang_up(self) -> None:
        self._ours.close()

    def close(self) -> None:
        self._ours.close()
        with contextlib.suppress(WireError, SystemExit):
            self.rank.result()
        self._theirs.close()


def words(frames: list[Frame]) -> list[str]:
    return [f"{one.kind.name} {one.seq} {b','.join(body for _, body in parts(one)).decode()}" for one in frames]
