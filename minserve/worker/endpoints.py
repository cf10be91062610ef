"""The sockets on which a worker's ranks find the server: one for each rank, all bound before the ranks are started."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minserve.errors import WorkerFailed

if TYPE_CHECKING:
    from pathlib import Path

LOOPBACK = "127.0.0.1"
FIRST_PORT = 29500  # where TorchServe's parallel workers begin, too
LAST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Endpoints:
    """N consecutive addresses: rank k's is `base + LOCAL_RANK`.

    `prefix` is "unix:<directory>/worker." or "tcp:127.0.0.1:"; a rank gets it and `base` through its environment.
    """

    prefix: str
    base: int
    count: int

    def __str__(self) -> str:
        last = self.base + self.count - 1
        return f"{self.prefix}{self.base}" if self.count == 1 else f"{self.prefix}{self.base} … {last}"

    @property
    def addresses(self) -> list[str]:
        """One for each rank, in rank order."""
        return [f"{self.prefix}{self.base + index}" for index in range(self.count)]


def unix_endpoints(directory: Path, slot: int, world_size: int) -> Endpoints:
    """Names for worker number `slot` of a model version: two workers of two ranks get worker.0 … worker.3."""
    return Endpoints(f"unix:{directory}/worker.", slot * world_size, world_size)


def listen_unix(endpoints: Endpoints) -> list[socket.socket]:
    """Binds every path. A socket left there by an earlier incarnation of this worker is replaced."""
    listeners: list[socket.socket] = []
    try:
        for address in endpoints.addresses:
            path = address.removeprefix("unix:")
            if os.path.lexists(path):
                os.unlink(path)
            listeners.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listeners[-1].bind(path)
            _listening(listeners[-1])
    except OSError:
        close_all(listeners)
        raise
    return listeners


def listen_tcp(world_size: int, first: int = FIRST_PORT) -> tuple[Endpoints, list[socket.socket]]:
    """Binds the first N consecutive free ports of the loopback interface from `first` on.

    Raises:
        WorkerFailed: there are none, or no sockets to bind.
    """
    base = first
    while base + world_size - 1 <= LAST_PORT:
        listeners: list[socket.socket] = []
        try:
            for port in range(base, base + world_size):
                listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                listeners.append(listener)
                listener.bind((LOOPBACK, port))
        except OSError as error:
            close_all(listeners)
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise WorkerFailed(f"cannot listen on {LOOPBACK}: {error.strerror}") from None
            base += len(listeners)  # the last one was taken; none of the run can start before it
            continue
        return Endpoints(f"tcp:{LOOPBACK}:", base, world_size), [_listening(listener) for listener in listeners]
    raise WorkerFailed(f"no {world_size} consecutive free ports on {LOOPBACK} from {first} on")


def _listening(listener: socket.socket) -> socket.socket:
    listener.listen(16)
    listener.setblocking(False)
    return listener


def close_all(listeners: list[socket.socket]) -> None:
    """Closes them and removes the paths of unix sockets."""
    for listener in listeners:
        name = listener.getsockname() if listener.fileno() >= 0 else ""
        listener.close()
        if isinstance(name, str) and name and os.path.lexists(name):
            os.unlink(name)
