"""A hop: messages from one stage to the next, in their order. The sender goes on at once, the receiver waits.

Each rank has one end of two hops: of the one that leads on, and of the one that comes to it. There are two kinds, over the
process group (group_hops.py) and over a socket between two ranks of one host (socket_hops.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from minserve.handlers.activations import Outgoing
from minserve.rank.order import Ticket


class Message(NamedTuple):
    """What has come: activations, or after a failure one tensor, its description."""

    ticket: Ticket
    failed: bool
    tensors: tuple[Tensor, ...]


class Sending(Protocol):
    """A message on its way."""

    def wait(self) -> None:
        """Waits until it is out, and with it the memory that it keeps.

        Raises:
            RuntimeError, torch.distributed.DistError: the hop is broken.
        """


class Outlet(Protocol):
    """The end that sends. One thread at a time uses it.

    Attributes:
        copies: it copies what it does not send at once; else what it is given must stay as it is until it is out.
    """

    copies: bool

    def send(self, outgoing: Outgoing) -> Sending:
        """Sends a message, without waiting for whoever receives it.

        Raises:
            RuntimeError, torch.distributed.DistError: the hop is broken.
        """


class Inlet(Protocol):
    """The end that receives. One thread at a time uses it."""

    @property
    def ready(self) -> Callable[[], bool] | None:
        """Tells whether a message has begun to come; None: that cannot be told."""

    def receive(self) -> Message:
        """Waits for the next message. Its tensors are new memory, so nothing stale shows.

        Raises:
            RuntimeError, torch.distributed.DistError: the hop is broken, or what came is no message.
        """
