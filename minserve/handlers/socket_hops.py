"""Hops over a stream socket between two ranks of one host, for activations in the memory of the CPU.

Not isend and irecv of the process group, which gloo makes two messages of, each agreed on beforehand in its own thread: on
two cores that costs 3 ms of CPU a request beside 2.5 ms of work in each stage, and two stages come to 0.8 of the requests of
one process. One sendmsg for the whole message costs 0.15 ms.
"""

from __future__ import annotations

import select
import socket
import struct

import torch

from minserve.handlers.activations import HEADER_LENGTH, Outgoing, read_header
from minserve.handlers.backlog import Backlog, behind, close_off, lost
from minserve.handlers.hops import Message, Sending
from minserve.handlers.tensor_memory import memory_of
from minserve.wire.messages import Buffer

_HEADER = struct.Struct(f"{HEADER_LENGTH}q")  # native: both ends are on one machine


class SocketOutlet:
    """Sends to one rank. What the socket does not take at once is copied, and a thread sends it.

    Args:
        connection: a stream socket. It is the outlet's from now on.
        peer: who is at the other end, for errors.
    """

    copies = True

    def __init__(self, connection: socket.socket, peer: str) -> None:
        connection.setblocking(True)  # a library may have set another default
        self._connection = connection
        self._peer = peer
        self._backlog = Backlog(connection, peer)

    def send(self, outgoing: Outgoing) -> Sending:
        """See `Outlet`."""
        header = _HEADER.pack(*outgoing.header)
        pieces: list[Buffer] = [header, *map(memory_of, outgoing.payloads)]
        taken = 0 if self._backlog.busy else self._send_now(pieces)
        if taken == sum(map(len, pieces)):
            return _OUT
        try:
            whole = [torch.frombuffer(bytearray(header), dtype=torch.uint8), *outgoing.payloads]
            return self._backlog.add([piece.clone() for piece in behind(whole, taken)])
        except BaseException:  # no memory
            close_off(self._connection)
            raise

    def _send_now(self, pieces: list[Buffer]) -> int:
        """Sends as many bytes as the socket takes at once, and returns their number."""
        try:
            return self._connection.sendmsg(pieces, (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise lost(self._peer) from error


class _Out:
    """A message that is out."""

    def wait(self) -> None:
        """Nothing to wait for."""


_OUT = _Out()


class SocketInlet:
    """Receives from one rank, straight into the memory of new tensors.

    Args:
        connection: a stream socket. It is the inlet's from now on.
        peer: who is at the other end, for errors.
    """

    def __init__(self, connection: socket.socket, peer: str) -> None:
        connection.setblocking(True)  # a library may have set another default
        self._connection = connection
        self._peer = peer
        self._header = bytearray(_HEADER.size)

    def ready(self) -> bool:
        """See `Inlet`. Also true when the other end has gone, which `receive` will tell."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return bool(poll.poll(0))

    def receive(self) -> Message:
        """See `Inlet`."""
        self._fill(memoryview(self._header))
        header = read_header(_HEADER.unpack(self._header))
        tensors = []
        for spec in header.specs:
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device="cpu")  # whatever the handler's default is
            if spec.nbytes:
                self._fill(memory_of(tensor))
            tensors.append(tensor)
        return Message(header.ticket, header.failed, tuple(tensors))

    def _fill(self, room: memoryview) -> None:
        while room:
            try:
                count = self._connection.recv_into(room, 0, socket.MSG_WAITALL)
            except OSError as error:
                raise lost(self._peer) from error
            if not count:
                raise lost(self._peer)
            room = room[count:]
