"""What the server and the warm launcher say to each other, over a socket that keeps packets apart (SOCK_SEQPACKET).

The launcher says READY once. Each START brings the write end of a pipe along, for what the process prints, and is answered
by one STARTED or REFUSED, in order.
"""

from __future__ import annotations

import msgspec

from minserve.errors import WireError

MAX_PACKET = 1024 * 1024  # an environment is far smaller, as a rule; a larger one goes to a plain launch


class Start(msgspec.Struct, array_like=True, tag="start"):
    """Fork a process.

    Attributes:
        torchrun: torchrun's own arguments; none of them: a rank without torchrun.
        environ: all of it, each `NAME=value`, in the bytes that the kernel knows.
        directory: its working directory.
    """

    torchrun: tuple[str, ...]
    environ: tuple[bytes, ...]
    directory: bytes


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """The launcher has imported all it needs."""


class Started(msgspec.Struct, array_like=True, tag="started"):
    """A process has been forked; it is the server's own child."""

    pid: int


class Refused(msgspec.Struct, array_like=True, tag="refused"):
    """A fork would differ from a process of its own, or cannot be had."""

    reason: str


Answer = Ready | Started | Refused
_starts = msgspec.msgpack.Decoder(Start)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Start | Answer) -> bytes:
    """One packet."""
    return msgspec.msgpack.encode(message)


def decode_start(packet: bytes) -> Start:
    """What the server wants.

    Raises:
        WireError: it is no START.
    """
    try:
        return _starts.decode(packet)
    except msgspec.DecodeError as error:  # a ValidationError is one
        raise WireError(f"bad message to the warm launcher: {error}") from None


def decode_answer(packet: bytes) -> Answer:
    """What the launcher answers.

    Raises:
        WireError: it is no answer.
    """
    try:
        return _answers.decode(packet)
    except msgspec.DecodeError as error:
        raise WireError(f"bad message from the warm launcher: {error}") from None
