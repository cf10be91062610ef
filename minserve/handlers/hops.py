"""Messages from one stage to another over a process group: the sender goes on at once, the receiver waits.

Of two ranks that talk over a group of two here, one always sends and one always receives: messages stay in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minserve.handlers.activations import HEADER_LENGTH, read_header
from minserve.rank.turns import Ticket


class Message(NamedTuple):
    """What has come: activations, or after a failure one tensor, its description."""

    ticket: Ticket
    failed: bool
    tensors: tuple[Tensor, ...]


class Sending:
    """A message on its way. It keeps the memory alive that is being sent."""

    def __init__(self, parts: list[Tensor], to: int, group: dist.ProcessGroup) -> None:
        self._parts = [(part, dist.isend(part, to, group=group)) for part in parts]

    def wait(self) -> None:
        """Waits until its memory is read (gloo), or lets this stream wait for that (NCCL)."""
        for _, work in self._parts:
            assert work is not None  # it is None in ranks outside of the group
            work.wait()


def receive(source: int, group: dist.ProcessGroup, device: torch.device) -> Message:
    """The next message of a rank. Every buffer is new, so nothing stale shows.

    Raises:
        RuntimeError, torch.distributed.DistError: the group is broken, or what came is no message.
    """
    numbers = torch.empty(HEADER_LENGTH, dtype=torch.int64, device=device)
    dist.recv(numbers, source, group=group)
    header = read_header(numbers)
    tensors = []
    for spec in header.specs:
        payload = torch.empty(spec.nbytes, dtype=torch.uint8, device=device)
        if spec.nbytes:
            dist.recv(payload, source, group=group)
        tensors.append(payload.view(spec.dtype).view(spec.shape))
    return Message(header.ticket, header.failed, tuple(tensors))
