"""Load on servers that take turns: the first, the second, the first again, so that a slow minute slows all of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.workspace import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

WRK = "wrk"
PYTHON = "python"
SCRIPT = Path(__file__).with_name("echo.lua")
BODY = b"x" * 128  # echo.lua's
WARM_UP_S = 1
GRACE_S = 30.0  # for a generator to report after its time


class LoadError(Exception):
    """A request failed: what was measured is not what was meant."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients saw of one server in one round."""

    requests_per_s: float
    p50_us: float
    p99_us: float


def choose_generator() -> str:
    """wrk where it is installed, for it takes the least CPU from the servers."""
    return WRK if shutil.which(WRK) else PYTHON


def take_turns(
    generator: str, urls: Mapping[str, str], clients: int, rounds: int, seconds: int, tell: Callable[[str], None]
) -> dict[str, list[Load]]:
    """Puts the same load on each server, one after the other, `rounds` times.

    Args:
        urls: by the servers' names.
        tell: gets a line after each load.

    Returns:
        By name, one `Load` a round.

    Raises:
        LoadError: a request failed.
    """
    loads: dict[str, list[Load]] = {name: [] for name in urls}
    for name, url in urls.items():
        _check_echo(name, url)
        put_load(generator, url, clients, WARM_UP_S)
    for number in range(1, rounds + 1):
        for name, url in urls.items():
            load = put_load(generator, url, clients, seconds)
            loads[name].append(load)
            tell(
                f"round {number} of {rounds}, {clients} clients, {name}: "
                f"{load.requests_per_s:.0f} requests/s, p50 {load.p50_us:.0f} µs, p99 {load.p99_us:.0f} µs"
            )
    return loads


def put_load(generator: str, url: str, clients: int, seconds: int) -> Load:
    """Keeps one server busy with `clients` closed loops.

    Raises:
        LoadError: a request failed.
    """
    if generator == WRK:
        command = [WRK, "--threads", "1", "--connections", str(clients), "--duration", f"{seconds}s"]
        command += ["--timeout", "10s", "--script", str(SCRIPT), url]
    else:
        command = [sys.executable, "-m", "tests.benchmarks.clients", url, str(clients), str(seconds)]
    done = subprocess.run(
        command, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=seconds + GRACE_S
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    if figures["failed"] or not figures["requests"]:
        raise LoadError(f"{url}: {figures['failed']} requests failed, {figures['requests']} were answered")
    return Load(figures["requests"] / figures["seconds"], figures["p50_us"], figures["p99_us"])


def _check_echo(name: str, url: str) -> None:
    """wrk compares no bodies: here is seen once that the server does what is measured."""
    request = urllib.request.Request(url, BODY, {"Content-Type": "application/octet-stream"})
    with urllib.request.urlopen(request, timeout=GRACE_S) as answer:
        if answer.read() != BODY:
            raise LoadError(f"{name} does not answer with the request's body")
