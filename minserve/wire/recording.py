"""A recording: the ordered batches of one worker, as `minserve record` keeps them and `minserve replay` plays them. Sans-IO.

    a line "minserve recording 1", then records, each a length (u32, little-endian) and that many bytes of msgpack:

    Header      first: what was recorded, where
    Sent        a batch, as every rank got it
    Ended       how a batch ended; batches that were under way when the recording stopped have none
    Gap         batches that are missing here: they came faster than they were read
    Stopped     last, if the server ended the recording and not whoever asked for it

Never pickle: a recording comes from elsewhere, and reading it must not run anything.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

from minserve.errors import WireError
from minserve.wire.messages import RequestMeta

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"minserve recording 1\n"
MAX_RECORD_BYTES = 2**31  # far above any batch; a length beyond it is damage
_LENGTH = struct.Struct("<I")


class Record(msgspec.Struct, array_like=True, tag=True, gc=False):
    """Base of all. Times are seconds since the epoch."""


class Header(Record):
    """What was recorded. `who` is "model/worker"; `bodies` says whether batches have theirs."""

    minserve: str
    model: str
    version: str
    who: str
    world_size: int
    batch_size: int
    bodies: bool
    began: float


class Sent(Record):
    """A batch. `bodies` are those of all parts of all requests, in order; None: not kept, the parts tell their lengths.

    `incarnation` names the life of the worker: its seqs count from 1, anew after each restart.
    """

    incarnation: str
    seq: int
    at: float
    requests: tuple[RequestMeta, ...]
    bodies: tuple[bytes, ...] | None = None


class Ended(Record):
    """A batch is over. `error` is what its clients were told; empty: they have got answers."""

    incarnation: str
    seq: int
    at: float
    error: str = ""


class Gap(Record):
    """Batches that were dropped before the next record."""

    batches: int


class Stopped(Record):
    """The server has ended the recording."""

    reason: str


AnyRecord = Header | Sent | Ended | Gap | Stopped
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyRecord] = msgspec.msgpack.Decoder(AnyRecord)


def encode(record: AnyRecord) -> bytes:
    """A record with its length in front."""
    data = _encoder.encode(record)
    return _LENGTH.pack(len(data)) + data


def decode(data: bytes) -> AnyRecord:
    """A record, given with its length.

    Raises:
        WireError: it is none.
    """
    try:
        return _decoder.decode(data[_LENGTH.size :])
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise WireError(f"not a record: {error}") from None


class RecordReader:
    """Cuts the bytes of a recording into records.

    Attributes:
        midway: whether the recording would be cut inside a record if it ended here.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._begun = False

    @property
    def midway(self) -> bool:
        """Whether it would be cut inside a record, or before the first, if it ended here."""
        return bool(self._bytes) or not self._begun

    def received(self, data: bytes) -> Iterator[bytes]:
        """Takes more bytes and yields the records they complete, each with its length, for `decode`.

        Raises:
            WireError: this is no recording.
        """
        self._bytes += data
        if not self._begun:
            if not MAGIC.startswith(bytes(self._bytes[: len(MAGIC)])):
                raise WireError(f"not a recording of minserve: it starts with {bytes(self._bytes[:24])!r}")
            if len(self._bytes) < len(MAGIC):
                return
            del self._bytes[: len(MAGIC)]
            self._begun = True
        begin = 0
        while (length := self._length(begin)) is not None and begin + length <= len(self._bytes):
            yield bytes(self._bytes[begin : begin + length])
            begin += length
        del self._bytes[:begin]

    def _length(self, begin: int) -> int | None:
        if len(self._bytes) < begin + _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._bytes, begin)
        if length > MAX_RECORD_BYTES:
            raise WireError(f"a record of {length} bytes, at most {MAX_RECORD_BYTES} are allowed")
        return _LENGTH.size + int(length)
