"""Hops over a process group: on CUDA by NCCL from GPU to GPU, and between hosts.

Of two ranks that talk over a group of two here, one always sends and one always receives: messages stay in order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from minserve.handlers.activations import HEADER_LENGTH, Outgoing, read_header
from minserve.handlers.hops import Message


class GroupOutlet:
    """Sends to one rank.

    Args:
        to: its global rank.
        device: where what is sent lies.
    """

    copies = False

    def __init__(self, to: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self._to = to
        self._group = group
        self._device = device

    def send(self, outgoing: Outgoing) -> _Sending:
        """See `Outlet`."""
        header = torch.tensor(outgoing.header, dtype=torch.int64, device=self._device)
        return _Sending([header, *outgoing.payloads], self._to, self._group)


class _Sending:
    """It keeps the memory alive that is being sent."""

    def __init__(self, parts: list[Tensor], to: int, group: dist.ProcessGroup) -> None:
        self._parts = [(part, dist.isend(part, to, group=group)) for part in parts]

    def wait(self) -> None:
        """Waits until its memory is read (gloo), or lets this stream wait for that (NCCL)."""
        for _, work in self._parts:
            assert work is not None  # it is None in ranks outside of the group
            work.wait()


class GroupInlet:
    """Receives from one rank.

    Args:
        source: its global rank.
        device: where activations arrive.
    """

    ready = None

    def __init__(self, source: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self._source = source
        self._group = group
        self._device = device

    def receive(self) -> Message:
        """See `Inlet`. On CUDA it waits for the header alone."""
        numbers = torch.empty(HEADER_LENGTH, dtype=torch.int64, device=self._device)
        dist.recv(numbers, self._source, group=self._group)
        header = read_header(numbers.tolist())
        tensors = []
        for spec in header.specs:
            payload = torch.empty(spec.nbytes, dtype=torch.uint8, device=self._device)
            if spec.nbytes:
                dist.recv(payload, self._source, group=self._group)
            tensors.append(payload.view(spec.dtype).view(spec.shape))
        return Message(header.ticket, header.failed, tuple(tensors))
