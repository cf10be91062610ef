"""Streams of 256 chunks of 100 bytes from two ranks: chunks a second, and the time to the first one."""

from __future__ import annotations

import http.client
import statistics
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tests.benchmarks.contest import OURS, Load, LoadError, pick, take_turns
from tests.benchmarks.peers.starting import BARE
from tests.benchmarks.peers.torchserve import TORCHSERVE
from tests.benchmarks.plot import Panel
from tests.benchmarks.report import Findings, compare
from tests.benchmarks.servers import ANSWER_TIMEOUT_S
from tests.benchmarks.workspace import HANDLERS, Model

if TYPE_CHECKING:
    from tests.benchmarks.run import Run
    from tests.benchmarks.servers import Up

SCENARIO = "streams, 2 ranks"
CHUNK = b"x" * 100
CHUNKS = 256
CLIENTS = (1, 16)
OTHERS = (TORCHSERVE, BARE)


@dataclass(frozen=True, slots=True)
class FirstChunk:
    """One client that reads streams whole, and notes when the first chunk of each has come."""

    up: Up
    model: str

    @property
    def name(self) -> str:
        """The server's."""
        return self.up.name

    def check(self) -> None:
        """One stream."""
        self.turn(0)

    def turn(self, seconds: int) -> Load:
        """One stream after the other."""
        url = urlsplit(self.up.url(self.model))
        taken: list[float] = []
        until = time.perf_counter() + seconds
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=ANSWER_TIMEOUT_S)
        with closing(connection):
            while not taken or time.perf_counter() < until:
                began = time.perf_counter()
                try:
                    connection.request("POST", url.path, b'""', {"Content-Type": "application/octet-stream"})
                    answer = connection.getresponse()
                    first = answer.read(len(CHUNK))
                    taken.append(1e6 * (time.perf_counter() - began))
                    rest = answer.read()
                except (OSError, http.client.HTTPException) as error:
                    raise LoadError(f"{self.name} broke off: {error!r}") from error
                if first + rest != CHUNK * CHUNKS:
                    raise LoadError(f"{self.name} does not answer with {CHUNKS} chunks")
        return Load(len(taken) / max(seconds, 1), statistics.median(taken), max(taken))


def measure(run: Run) -> Findings:
    """Whole streams at 1 and 16 clients, then the first chunks."""
    model = Model("stream", (HANDLERS / "stream.py",))
    with ExitStack() as stack:
        ups = [*run.servers(stack, [model]).values(), run.bare(stack)]
        found = {
            clients: take_turns(
                run,
                f"streams, {clients} clients",
                {up.name: run.clients(up, model.name, clients, answer=CHUNK * CHUNKS) for up in ups},
            )
            for clients in CLIENTS
        }
        first = take_turns(run, "first chunks", {up.name: FirstChunk(up, model.name) for up in ups})
    rows, panels = [], []
    for clients, loads in found.items():
        chunks = {name: [CHUNKS * rate for rate in pick(loads, name, "requests_per_s")] for name in (OURS, *OTHERS)}
        what = f"chunks/s, {clients} client{'s' * (clients > 1)}"
        rows += [compare(SCENARIO, what, "", chunks[OURS], name, chunks[name]) for name in OTHERS]
        panels.append(Panel.of(f"{SCENARIO}: {what}", "", chunks))
    for name in OTHERS:
        times = [pick(first, server, "p50_us") for server in (OURS, name)]
        rows.append(compare(SCENARIO, "p50 of the first chunk, 1 client", "µs", times[0], name, times[1]))
    return Findings(rows, panels[1:])
