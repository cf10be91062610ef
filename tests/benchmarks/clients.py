"""A load generator in Python: an open loop, which wrk cannot do, and a closed one for machines without wrk.

    python -m tests.benchmarks.clients URL BODY SECONDS --clients N
    python -m tests.benchmarks.clients URL BODY SECONDS --rate REQUESTS_A_SECOND

Prints the same line of JSON as post.lua does. In the open loop requests come at random times (a Poisson process, the same in
each run) and do not wait for each other; a latency counts from when its request was due. It costs several times the CPU of
wrk, which the servers then lack, on both sides of a ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import SplitResult, urlsplit

import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable

SEED = 6
LAST_ANSWERS_S = 30.0  # for what is under way at the end of an open loop
_LENGTH = re.compile(rb"\r\nContent-Length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\nTransfer-Encoding: *chunked", re.IGNORECASE)


class Connection(asyncio.Protocol):
    """One connection with one request under way.

    Args:
        request: its bytes.
        answered: called with the connection and whether the answer was good.
    """

    def __init__(self, request: bytes, answered: Callable[[Connection, bool], None]) -> None:
        self._request = request
        self._answered = answered
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self.due = 0.0

    def send(self, due: float) -> None:
        """Sends the request that was due at that time."""
        self.due = due
        if self._transport is not None:
            self._transport.write(self._request)

    def stop(self) -> None:
        """Sends no more and forgets the request under way."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Nothing is sent yet."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """A piece of the answer, or all of it, which is the rule."""
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        if head < 0 or not self._is_whole(head):
            return
        good = self._received.startswith(b"HTTP/1.1 200 ")
        self._received.clear()
        self._answered(self, good)

    def _is_whole(self, head: int) -> bool:
        if length := _LENGTH.search(self._received, 0, head + 2):
            return len(self._received) >= head + 4 + int(length[1])
        return bool(_CHUNKED.search(self._received, 0, head + 2)) and self._received.endswith(b"\r\n0\r\n\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        """The server has hung up, unless `stop` did."""
        if self._transport is not None:
            self._transport = None
            self._answered(self, False)


class Generator:
    """What both loops count, and how they connect."""

    def __init__(self, url: SplitResult, body: bytes) -> None:
        self._host, self._port = url.hostname or "127.0.0.1", url.port or 80
        head = (
            f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\n"
            f"Content-Type: application/octet-stream\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._request = head.encode() + body
        self._latencies: list[float] = []
        self._failed = 0

    async def closed(self, clients: int, seconds: float) -> str:
        """Each client sends its next request when it has its answer."""

        def answered(connection: Connection, good: bool) -> None:
            self._count(connection, good)
            if good:
                connection.send(time.perf_counter())

        connections = [await self._connect(answered) for _ in range(clients)]
        began = time.perf_counter()
        for connection in connections:
            connection.send(time.perf_counter())
        await asyncio.sleep(seconds)
        took = time.perf_counter() - began
        for connection in connections:
            connection.stop()
        return self._figures(took)

    async def open(self, rate: float, seconds: float) -> str:
        """Requests at their own times, each on a connection that is free, or on a new one."""
        chance = random.Random(SEED)
        free: list[Connection] = []
        connections: list[Connection] = []
        under_way = 0
        idle = asyncio.Event()

        def answered(connection: Connection, good: bool) -> None:
            nonlocal under_way
            under_way -= 1
            self._count(connection, good)
            if good:
                free.append(connection)
            if not under_way:
                idle.set()

        began = due = time.perf_counter()
        while (due := due + chance.expovariate(rate)) < began + seconds:
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            under_way += 1
            idle.clear()
            if not free:
                connections.append(await self._connect(answered))
                free.append(connections[-1])
            free.pop().send(due)
        async with asyncio.timeout(LAST_ANSWERS_S):
            if under_way:
                await idle.wait()
        took = time.perf_counter() - began
        for connection in connections:
            connection.stop()
        return self._figures(took)

    async def _connect(self, answered: Callable[[Connection, bool], None]) -> Connection:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(lambda: Connection(self._request, answered), self._host, self._port))[1]

    def _count(self, connection: Connection, good: bool) -> None:
        if good:
            self._latencies.append(time.perf_counter() - connection.due)
        else:
            self._failed += 1

    def _figures(self, took: float) -> str:
        latencies = self._latencies
        cuts = statistics.quantiles(latencies, n=100) if len(latencies) > 1 else latencies * 99 or [0.0] * 99
        figures = {"requests": len(latencies), "seconds": took, "failed": self._failed}
        return json.dumps({**figures, "p50_us": cuts[49] * 1e6, "p99_us": cuts[98] * 1e6})


def main() -> None:
    """Puts the load and prints the line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url", type=urlsplit)
    parser.add_argument("body", type=Path)
    parser.add_argument("seconds", type=float)
    loop = parser.add_mutually_exclusive_group(required=True)
    loop.add_argument("--clients", type=int)
    loop.add_argument("--rate", type=float)
    arguments = parser.parse_args()
    generator = Generator(arguments.url, arguments.body.read_bytes())
    if arguments.rate:
        print(uvloop.run(generator.open(arguments.rate, arguments.seconds)))
    else:
        print(uvloop.run(generator.closed(arguments.clients, arguments.seconds)))


if __name__ == "__main__":
    main()
