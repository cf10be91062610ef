"""Frames: how a message lies on a rank's socket. Sans-IO, used by both ends.

    offset  0        2      3       4              8              16              24
            ┌────────┬──────┬───────┬──────────────┬──────────────┬───────────────┬────────────┬──────────┐
            │ magic  │ kind │ flags │ meta length  │ seq          │ body length   │ meta       │ body     │
            │ u16    │ u8   │ u8    │ u32          │ u64          │ u64           │ (msgpack)  │ (raw)    │
            └────────┴──────┴───────┴──────────────┴──────────────┴───────────────┴────────────┴──────────┘

Little-endian. `seq` numbers the batches of one worker from 1; a frame about a batch carries that batch's seq, any other 0.

`FrameReader` hands out the memory that the next bytes belong in, so that an asyncio `BufferedProtocol` and a blocking
`recv_into` drive it the same way, and a large body lands where it will stay: nothing is joined or moved afterwards.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING

import msgspec

from minserve.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = struct.Struct("<HBBIQQ")
MAGIC = 0x4D53  # "SM" on the wire
MAX_META_BYTES = 64 * 1024 * 1024  # a batch's headers and part names; far above any real one, far below memory
SMALL_BYTES = 16 * 1024  # up to here one copy of a whole frame costs less than handing its pieces to each socket
SCRATCH_BYTES = 256 * 1024  # what uvloop and a unix socket move in one read


class Kind(enum.IntEnum):
    """What a frame says. Below 32: from a rank to the server. From 32: from the server to every rank.

    From 64: from a frontend process to the one with the dispatchers. From 96: the other way. Their seq numbers the requests
    of that frontend process.
    """

    HELLO = 1  # who I am; the first frame on a connection
    PROGRESS = 2  # how far my load is
    LOADED = 3  # the handler is ready
    FAILED = 4  # the handler could not be loaded
    REPLY = 5  # rank 0: the answers of batch seq, its last frame
    CHUNK = 6  # rank 0: one step of a streaming batch
    ERROR = 7  # any rank: batch seq ended with an exception here
    DONE = 8  # ranks > 0 with replyAfter: all: batch seq is finished here
    METRICS = 9  # any rank: what was recorded in batch seq, or while loading

    LOAD = 32
    BATCH = 33
    CONTINUE = 34  # every rank left batch seq with the same error: those that raised may go on
    GRANT = 35  # the stream of batch seq may go up to a step
    CANCEL = 36  # the stream of batch seq ends behind the last granted step
    SHUTDOWN = 37
    MEMORY = 38  # the answer to HELLO; with it come descriptors of shared memory, where there is any

    OPEN = 64  # this process is about to accept clients
    ASK = 65  # may this client send a request?
    SUBMIT = 66  # a request
    LEAVE = 67  # its client has left
    TAKEN = 68  # its client has taken so much of the stream
    RECORDED = 69  # what was measured since the last one; with a seq: the answer to that GATHER
    LOG = 70  # a line for the log

    START = 96  # what a frontend process is to do; the first frame
    ALLOWED = 97  # the answer to ASK: it may
    REFUSED = 98  # the answer to ASK or SUBMIT, or the end of a stream: an error
    ANSWER = 99  # the answer to SUBMIT
    STREAM = 100  # the head of a stream
    PIECE = 101  # some bytes of it
    END = 102  # the end of it
    GATHER = 103  # tell what was measured
    STOP = 104  # accept nobody any more, let finish what is in flight, and end


PROBE = 1  # flag of a BATCH without requests: run the handler's probe; every rank answers, those > 0 with DONE


class Frame(msgspec.Struct, gc=False):
    """One message. `body` is the reader's own fresh memory, the receiver may keep and change it."""

    kind: Kind
    flags: int
    seq: int
    meta: bytearray
    body: bytearray


def header(kind: Kind, seq: int, meta_length: int, body_length: int, flags: int = 0) -> bytes:
    """The 24 bytes in front of `meta` and `body`."""
    return HEADER.pack(MAGIC, kind, flags, meta_length, seq, body_length)


def encode(kind: Kind, seq: int = 0, meta: bytes = b"", body: bytes = b"", flags: int = 0) -> bytes:
    """A whole small frame as one piece; what is large goes out as pieces instead, see `messages`."""
    return header(kind, seq, len(meta), len(body), flags) + meta + body


class FrameReader:
    """Cuts the byte stream of one connection into frames.

    Call `buffer()`, put bytes at its start, tell how many with `received(n)`, take the frames it yields. A view from
    `buffer()` is good until the next call of `received`.

    Args:
        max_body: largest body length to accept, in bytes. It is checked before memory is set aside.
        kinds: the frame kinds the other end may send.
        max_meta: likewise for the meta.
    """

    def __init__(self, max_body: int, kinds: frozenset[Kind], max_meta: int = MAX_META_BYTES) -> None:
        self._max_body = max_body
        self._max_meta = max_meta
        self._kinds = {int(kind): kind for kind in kinds}  # looking a number up is faster than calling Kind
        self._scratch = bytearray(SCRATCH_BYTES)
        self._scratch_view = memoryview(self._scratch)
        self._start = 0  # where the first frame that is not yet whole begins in the scratch
        self._end = 0
        # A frame too large for the scratch has memory of its own, and these say how much of it has come.
        self._large: Frame | None = None
        self._meta_missing = 0
        self._body_missing = 0

    def buffer(self) -> memoryview:
        """Where the next bytes go. Never empty."""
        if self._large is None:
            return self._scratch_view[self._end :]
        if self._meta_missing:
            return memoryview(self._large.meta)[-self._meta_missing :]
        return memoryview(self._large.body)[-self._body_missing :]

    def received(self, count: int) -> Iterator[Frame]:
        """Takes note of `count` bytes written at the start of `buffer()` and yields the frames they complete.

        Exhaust the iterator before asking for `buffer()` again.

        Raises:
            WireError: the bytes are no frame, or a frame over its limits. The connection is beyond repair then.
        """
        if self._large is not None:
            yield from self._received_large(count)
            return
        self._end += count
        scratch = self._scratch
        while self._end - self._start >= HEADER.size:
            kind, flags, meta_length, seq, body_length = self._parse_header()
            begin = self._start + HEADER.size
            middle = begin + meta_length
            stop = middle + body_length
            if stop > self._end:
                if stop - self._start > SCRATCH_BYTES:
                    self._begin_large(kind, flags, seq, meta_length, body_length)
                    return
                break
            self._start = stop
            yield Frame(kind, flags, seq, scratch[begin:middle], scratch[middle:stop])
        self._compact()

    @property
    def midway(self) -> bool:
        """Whether the stream would be cut inside a frame if it ended here."""
        return self._large is not None or self._end > self._start

    def _parse_header(self) -> tuple[Kind, int, int, int, int]:
        magic, kind, flags, meta_length, seq, body_length = HEADER.unpack_from(self._scratch, self._start)
        if magic != MAGIC:
            raise WireError(f"not a minserve frame: it starts with 0x{magic:04x}")
        known = self._kinds.get(kind)
        if known is None:
            raise WireError(f"frame kind {kind} is not allowed here")
        if meta_length > self._max_meta:
            raise WireError(f"frame meta of {meta_length} bytes, at most {self._max_meta} are allowed")
        if body_length > self._max_body:
            raise WireError(f"frame body of {body_length} bytes, at most {self._max_body} are allowed")
        return known, flags, meta_length, seq, body_length

    def _begin_large(self, kind: Kind, flags: int, seq: int, meta_length: int, body_length: int) -> None:
        here = memoryview(self._scratch)[self._start + HEADER.size : self._end]
        frame = Frame(kind, flags, seq, bytearray(meta_length), bytearray(body_length))
        meta, body = here[:meta_length], here[meta_length:]
        frame.meta[: len(meta)] = meta
        frame.body[: len(body)] = body
        self._large = frame
        self._meta_missing = meta_length - len(meta)
        self._body_missing = body_length - len(body)
        self._start = self._end = 0

    def _received_large(self, count: int) -> Iterator[Frame]:
        assert self._large is not None
        if self._meta_missing:
            self._meta_missing -= count
        else:
            self._body_missing -= count
        if not self._meta_missing and not self._body_missing:
            frame, self._large = self._large, None
            yield frame

    def _compact(self) -> None:
        """Moves an unfinished frame to the front, so that the rest of it always finds room."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start:
            rest = self._end - self._start
            self._scratch[:rest] = self._scratch[self._start : self._end]
            self._start, self._end = 0, rest


FROM_RANK = frozenset(kind for kind in Kind if kind < Kind.LOAD)
FROM_SERVER = frozenset(kind for kind in Kind if Kind.LOAD <= kind < Kind.OPEN)
FROM_FRONTEND = frozenset(kind for kind in Kind if Kind.OPEN <= kind < Kind.START)
TO_FRONTEND = frozenset(kind for kind in Kind if kind >= Kind.START)
