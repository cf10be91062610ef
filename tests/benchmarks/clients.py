"""A closed-loop load generator for machines without wrk: each client sends its next request when it has its answer.

    python -m tests.benchmarks.clients URL CLIENTS SECONDS

Prints the same line of JSON as echo.lua does. It costs several times the CPU of wrk, which the servers then lack, on both
sides of a ratio.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import time
from typing import cast
from urllib.parse import urlsplit

import uvloop

BODY = b"x" * 128  # echo.lua's
_LENGTH = re.compile(rb"\r\nContent-Length: *(\d+)", re.IGNORECASE)


class Client(asyncio.Protocol):
    """One connection with one request under way.

    Args:
        request: its bytes.
        latencies: where the seconds of each answered request go.
    """

    def __init__(self, request: bytes, latencies: list[float]) -> None:
        self._request = request
        self._latencies = latencies
        self._received = bytearray()
        self._sent_at = 0.0
        self._transport: asyncio.Transport | None = None
        self.failed = 0

    def stop(self) -> None:
        """Sends no more and forgets the request under way."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The first request."""
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        """A piece of the answer, or all of it, which is the rule."""
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        length = _LENGTH.search(self._received, 0, head + 2) if head >= 0 else None
        if length is None or len(self._received) < head + 4 + int(length[1]):
            return
        if self._received.startswith(b"HTTP/1.1 200 ") and self._received.endswith(BODY):
            self._latencies.append(time.perf_counter() - self._sent_at)
        else:
            self.failed += 1
        self._received.clear()
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """The server has hung up, unless `stop` did."""
        if self._transport is not None:
            self._transport = None
            self.failed += 1

    def _send(self) -> None:
        if self._transport is not None:
            self._sent_at = time.perf_counter()
            self._transport.write(self._request)


async def run(url: str, clients: int, seconds: float) -> str:
    """Puts the load and returns the line."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {len(BODY)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    began = time.perf_counter()
    connections = [
        (await loop.create_connection(lambda: Client(head.encode() + BODY, latencies), host, port))[1]
        for _ in range(clients)
    ]
    await asyncio.sleep(seconds)
    took = time.perf_counter() - began
    for connection in connections:
        connection.stop()
    cuts = statistics.quantiles(latencies, n=100) if len(latencies) > 1 else [0.0] * 99
    return json.dumps(
        {
            "requests": len(latencies),
            "seconds": took,
            "failed": sum(connection.failed for connection in connections),
            "p50_us": cuts[49] * 1e6,
            "p99_us": cuts[98] * 1e6,
        }
    )


if __name__ == "__main__":
    print(uvloop.run(run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))
