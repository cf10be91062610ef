"""The stages of a pipeline in a ring: each sends to the next one, and the last one sends its results to the first."""

from __future__ import annotations

import os
import socket
import struct
from typing import NamedTuple

import torch
import torch.distributed as dist

from minserve.handlers.group_hops import GroupInlet, GroupOutlet
from minserve.handlers.hops import Inlet, Outlet
from minserve.handlers.socket_hops import SocketInlet, SocketOutlet
from minserve.rank.failures import leave_out

PATIENCE_S = 60.0  # for a rank that has said that it comes
SEND_BUFFER = 4 * 2**20  # bytes; the kernel gives as much of it as net.core.wmem_max allows
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred, unix(7)


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
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(b"")  # the kernel finds six bytes that nobody has for a name, and no file is left behind: unix(7)
        listener.listen()
        names, pids = _introduce(group, listener.getsockname())
        to_next = socket.socket(socket.AF_UNIX)
        to_next.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        to_next.connect(names[(stage + 1) % len(names)])
        listener.settimeout(PATIENCE_S)
        return to_next, accept_from(listener, pids[stage - 1])


def _introduce(group: dist.ProcessGroup, name: bytes) -> tuple[list[bytes], list[int]]:
    """The names of all ranks' listeners, and their pids. As plain numbers: no rank unpickles what another one sends."""
    mine = torch.tensor([os.getpid(), *name])
    cards = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(cards, mine, group=group)
    told = [card.tolist() for card in cards]
    return [bytes(name) for _, *name in told], [pid for pid, *_ in told]


def accept_from(listener: socket.socket, pid: int) -> socket.socket:
    """The connection of one process of this user. Any other process can see the name of the listener, and is refused.

    Raises:
        OSError: it does not come within the listener's timeout.
    """
    while True:
        connection, _ = listener.accept()
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(peer)[:2] == (pid, os.getuid()):
            return connection
        connection.close()
