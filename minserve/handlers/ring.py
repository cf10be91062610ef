"""The stages of a pipeline in a ring: each sends to the next one, and the last one sends its results to the first."""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
from typing import NamedTuple

import torch
import torch.distributed as dist

from minserve.handlers.group_hops import GroupInlet, GroupOutlet
from minserve.handlers.hops import Inlet, Outlet
from minserve.handlers.socket_hops import SocketInlet, SocketOutlet
from minserve.rank.failures import leave_out

PATIENCE_S = 60.0  # for a rank that has said that it comes
KEY_S = 5.0  # for the key of one that has connected
KEY_BYTES = 16
SEND_BUFFER = 4 * 2**20  # bytes; the kernel gives as much of it as net.core.wmem_max allows


class Ring(NamedTuple):
    """A rank's ends of the two hops that it has part in."""

    outlet: Outlet
    inlet: Inlet


def join(group: dist.ProcessGroup, device: torch.device) -> Ring:
    """Connects each rank of a group with the next one. A collective call: every rank makes it.

    Args:
        group: of at least two ranks.
        device: where activations lie.

    Raises:
        OSError: a rank does not come, or the kernel has no sockets.
    """
    ranks, stage = dist.get_process_group_ranks(group), dist.get_rank(group)
    ahead, behind = ranks[(stage + 1) % len(ranks)], ranks[stage - 1]
    if device.type == "cpu" and _on_one_host():
        to_next, from_last = _connect(group, stage)
        return Ring(SocketOutlet(to_next, f"rank {ahead}"), SocketInlet(from_last, f"rank {behind}"))
    # Results have a group of their own: on NCCL one that is waited for would hold up what is sent behind it.
    back = dist.new_group(ranks, use_local_synchronization=True)
    leave_out(back)  # results come while another batch has its turn
    first, last = stage == 0, stage == len(ranks) - 1
    outlet = GroupOutlet(ahead, back if last else group, device)
    return Ring(outlet, GroupInlet(behind, back if first else group, device))


def _on_one_host() -> bool:
    """Whether one agent has started all ranks; of another one's, perhaps in another container, nothing is known."""
    world = os.environ.get("WORLD_SIZE")
    return world is not None and world == os.environ.get("LOCAL_WORLD_SIZE")


def _connect(group: dist.ProcessGroup, stage: int) -> tuple[socket.socket, socket.socket]:
    """Sockets to the next rank and from the one before. Every rank listens, and connects before it accepts."""
    # An abstract name, behind which no file is left; not one that the kernel finds, for gVisor finds none.
    name, key = b"\0minserve-" + os.urandom(8).hex().encode(), os.urandom(KEY_BYTES)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as undone:
        listener.bind(name)
        listener.listen()
        cards = _exchange(group, key + name)
        ahead = cards[(stage + 1) % len(cards)]
        to_next = undone.enter_context(socket.socket(socket.AF_UNIX))
        to_next.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        to_next.settimeout(PATIENCE_S)
        to_next.connect(ahead[KEY_BYTES:])
        to_next.sendall(ahead[:KEY_BYTES])
        listener.settimeout(PATIENCE_S)
        from_last = accept_from(listener, key)
        undone.pop_all()
        return to_next, from_last


def _exchange(group: dist.ProcessGroup, mine: bytes) -> list[bytes]:
    """What each rank says, in as many bytes. As plain numbers: no rank unpickles what another one sends."""
    said = torch.tensor(list(mine), device="cpu")  # whatever the handler's default is
    cards = [torch.empty_like(said) for _ in range(dist.get_world_size(group))]
    dist.all_gather(cards, said, group=group)
    return [bytes(card.tolist()) for card in cards]


def accept_from(listener: socket.socket, key: bytes) -> socket.socket:
    """The connection that shows the key. Every process of the machine can see the name of the listener and call it.

    The key, and not SO_PEERCRED: in a container of its own, and in gVisor, a pid is not what the other rank takes it for.

    Raises:
        OSError: it does not come within the listener's timeout.
    """
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            raise TimeoutError(f"the stage before this one has not connected in {PATIENCE_S:.0f} s") from None
        connection.settimeout(KEY_S)
        with contextlib.suppress(OSError):
            if hmac.compare_digest(connection.recv(len(key)), key):
                return connection
        connection.close()
