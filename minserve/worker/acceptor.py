"""Waits until exactly one rank has come to each endpoint and has proved that this launch started it.

What else connects (a second process for a rank, one without the secret, one that says nothing, one that says rubbish) is
closed and logged, and costs the ranks nothing but a backlog place.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minserve.errors import WireError
from minserve.wire.frames import FrameReader, Kind
from minserve.wire.messages import Hello, unpack
from minserve.worker.endpoints import close_all
from minserve.worker.memory import give

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from minserve.worker.memory import Memory

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0  # a rank says HELLO right after it has connected
HELLO_BYTES = 4096
MAX_STRANGERS = 16  # connections on one endpoint that have not said HELLO yet


@dataclass(frozen=True, slots=True)
class Expected:
    """What a genuine HELLO says."""

    world_size: int
    worker: str
    secret: str


@dataclass(slots=True)
class Arrival:
    """A rank that has proved itself."""

    hello: Hello
    socket: socket.socket


class Acceptor:
    """Accepts one rank per listener, then closes the listeners.

    Args:
        listeners: bound and listening, non-blocking, in rank order.
        on_arrival: called with each genuine rank.
        memory: what each is given in answer to its HELLO.
    """

    def __init__(
        self,
        listeners: list[socket.socket],
        expected: Expected,
        on_arrival: Callable[[Arrival], None] | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._listeners = listeners
        self._expected = expected
        self._on_arrival = on_arrival
        self._memory = memory
        self._arrivals: dict[int, Arrival] = {}
        self._complete = asyncio.Event()

    @property
    def missing(self) -> list[int]:
        """The ranks that have not come yet."""
        return [rank for rank in range(self._expected.world_size) if rank not in self._arrivals]

    async def run(self) -> Sequence[Arrival]:
        """Waits for all ranks, in rank order. Cancelling it closes everything."""
        async with asyncio.TaskGroup() as group:
            servers = [group.create_task(self._serve(rank)) for rank in range(self._expected.world_size)]
            try:
                await self._complete.wait()
            except asyncio.CancelledError:
                for arrival in self._arrivals.values():
                    arrival.socket.close()
                raise
            finally:
                for server in servers:
                    server.cancel()
                await asyncio.wait(servers)  # they still have the listeners in the loop's poll
                close_all(self._listeners)
        return [self._arrivals[rank] for rank in range(self._expected.world_size)]

    async def _serve(self, rank: int) -> None:
        loop = asyncio.get_running_loop()
        strangers = asyncio.Semaphore(MAX_STRANGERS)
        async with asyncio.TaskGroup() as group:
            while True:
                await strangers.acquire()
                connection, _ = await loop.sock_accept(self._listeners[rank])
                connection.setblocking(False)
                task = group.create_task(self._greet(rank, connection))
                task.add_done_callback(lambda _: strangers.release())

    async def _greet(self, rank: int, connection: socket.socket) -> None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await _read_hello(connection)
            self._check(rank, hello)
            give(self._memory, connection, rank)
        except TimeoutError:
            self._reject(rank, connection, f"no HELLO within {HELLO_TIMEOUT_S:g} s")
        except (WireError, OSError) as error:
            self._reject(rank, connection, str(error))
        except asyncio.CancelledError:
            connection.close()
            raise
        else:
            arrival = Arrival(hello, connection)
            self._arrivals[rank] = arrival
            if self._on_arrival is not None:
                self._on_arrival(arrival)
            if not self.missing:
                self._complete.set()

    def _check(self, rank: int, hello: Hello) -> None:
        expected = self._expected
        if not hmac.compare_digest(hello.secret.encode(), expected.secret.encode()):
            raise WireError("wrong secret")
        if (hello.worker, hello.world_size) != (expected.worker, expected.world_size):
            raise WireError(f"belongs to {hello.worker} with {hello.world_size} ranks")
        if hello.rank != rank or hello.local_rank != rank:
            raise WireError(f"is rank {hello.rank} (local rank {hello.local_rank}), which has another endpoint")
        if rank in self._arrivals:
            raise WireError(f"second connection for rank {rank}, pid {hello.pid}")

    def _reject(self, rank: int, connection: socket.socket, reason: str) -> None:
        connection.close()
        logger.warning("%s: closed a connection on the endpoint of rank %d: %s", self._expected.worker, rank, reason)


async def _read_hello(connection: socket.socket) -> Hello:
    loop = asyncio.get_running_loop()
    reader = FrameReader(0, frozenset({Kind.HELLO}), max_meta=HELLO_BYTES)
    while True:
        count = await loop.sock_recv_into(connection, reader.buffer())
        if not count:
            raise WireError("closed before HELLO")
        for frame in reader.received(count):
            if reader.midway:
                raise WireError("bytes behind HELLO: a rank waits for LOAD")
            return unpack(Hello, frame.meta)
