"""A contestant that answers HTTP, under closed-loop load: each client sends its next request when it has its answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.contest import Load, LoadError, cpu_seconds
from tests.benchmarks.servers import Up, ask
from tests.benchmarks.workspace import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Sequence

WRK = "wrk"
PYTHON = "python"
SCRIPT = Path(__file__).with_name("post.lua")
GRACE_S = 60.0  # for a generator to report after its time
SHOWN = 60  # bytes of a wrong answer


def choose_generator() -> str:
    """wrk where it is installed, for it takes the least CPU from the servers."""
    return WRK if shutil.which(WRK) else PYTHON


@dataclass(frozen=True, slots=True)
class Clients:
    """Clients of one model.

    Attributes:
        body: a file that each request sends.
        answer: what must come back; None: anything with status 200.
        rate: requests a second, at times that do not wait for answers; 0: a closed loop.
    """

    generator: str
    up: Up
    model: str
    clients: int
    body: Path
    answer: bytes | None = None
    rate: int = 0

    @property
    def name(self) -> str:
        """The server's."""
        return self.up.name

    def check(self) -> None:
        """wrk compares no bodies: here is seen once that the server does what is measured."""
        status, answer = ask(self.up.url(self.model), self.body.read_bytes())
        if status != 200 or self.answer not in (None, answer):
            raise LoadError(f"{self.name} answers {status} {answer[:SHOWN]!r}, not {(self.answer or b'')[:SHOWN]!r}")

    def turn(self, seconds: int) -> Load:
        """Puts the load on and reads CPU times before and after it.

        Raises:
            LoadError: a request failed.
        """
        server, ranks = [self.up.pid], self.up.ranks(self.model)
        before = cpu_seconds(server), cpu_seconds(ranks)
        figures = _generate(self._command(seconds), self.body, seconds)
        used = cpu_seconds(server) - before[0], cpu_seconds(ranks) - before[1]
        requests = figures["requests"]
        if figures["failed"] or not requests:
            raise LoadError(f"{figures['failed']:.0f} requests failed, {requests:.0f} were answered")
        per_request = [1e6 * seconds_used / requests for seconds_used in used]
        return Load(requests / figures["seconds"], figures["p50_us"], figures["p99_us"], *per_request)

    def _command(self, seconds: int) -> list[str]:
        url, body = self.up.url(self.model), str(self.body)
        python = [sys.executable, "-m", "tests.benchmarks.clients", url, body, str(seconds)]
        if self.rate:
            return [*python, "--rate", str(self.rate)]
        if self.generator == PYTHON:
            return [*python, "--clients", str(self.clients)]
        wrk = [WRK, "--threads", "1", "--connections", str(self.clients), "--duration", f"{seconds}s"]
        return [*wrk, "--timeout", "30s", "--script", str(SCRIPT), url]


def _generate(command: Sequence[str], body: Path, seconds: int) -> dict[str, float]:
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "BENCH_BODY": str(body)},
            check=True,
            capture_output=True,
            text=True,
            timeout=seconds + GRACE_S,
        )
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.SubprocessError as error:
        raise LoadError(f"the load generator failed: {error} {getattr(error, 'stderr', '')}") from error
    return figures
