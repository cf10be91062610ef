"""Starts the peers, each in its own environment, and waits until they answer."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.contest import LoadError
from tests.benchmarks.programs import START_TIMEOUT_S, Program, ProgramError
from tests.benchmarks.servers import Up, ask
from tests.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.benchmarks.peers.environments import Environments
    from tests.benchmarks.workspace import Workspace

APPS = Path(__file__).parent
BARE = "bare aiohttp"
RECEIVER = "a plain socket"
MOSEC, LITSERVE, RAY = "mosec", "LitServe", "Ray Serve"
ONE, BATCH = "one", "batch"  # the models of mosec, LitServe and Ray Serve
POLL_S = 0.05


@contextlib.contextmanager
def bare(workspace: Workspace) -> Iterator[Up]:
    """The aiohttp application, in our own environment."""
    with Program(workspace, "bare", [sys.executable, "-m", "tests.benchmarks.peers.bare_app"]) as program:
        yield Up(BARE, program.wait_for(r"^http\S*")[0], program.pid, program)


@contextlib.contextmanager
def receiver(workspace: Workspace) -> Iterator[Up]:
    """What only takes a body from its socket."""
    with Program(workspace, "receiver", [sys.executable, "-m", "tests.benchmarks.peers.receiver_app"]) as program:
        yield Up(RECEIVER, program.wait_for(r"^http\S*")[0], program.pid, program)


@contextlib.contextmanager
def echo_server(workspace: Workspace, environments: Environments, name: str) -> Iterator[Up]:
    """mosec, LitServe or Ray Serve with the models `one` and `batch`.

    Raises:
        ProgramError: it cannot be had, or did not start.
    """
    peer = {MOSEC: "mosec", LITSERVE: "litserve", RAY: "ray"}[name]
    python = str(environments.bin(peer) / "python")
    (port,) = free_ports(1)
    arguments = {
        MOSEC: ["--address", "127.0.0.1", "--port", str(port), "--timeout", "60000", "--log-level", "warning"],
        LITSERVE: [str(port)],
        RAY: [str(port), str(workspace.new_folder("ray"))],
    }[name]
    environ = {"RAY_USAGE_STATS_ENABLED": "0"}
    with Program(workspace, peer, [python, str(APPS / f"{peer}_app.py"), *arguments], environ) as program:
        up = Up(name, program.wait_for(r"^http\S*")[0], program.pid, program)
        wait_for_models(up, (ONE, BATCH))
        yield up


def wait_for_models(up: Up, models: Iterable[str], body: bytes = b'""') -> None:
    """Asks each model until it answers with 200.

    Raises:
        ProgramError: not in time.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    for model in models:
        last: object = ""
        while time.monotonic() < deadline:
            try:
                last = ask(up.url(model), body)
                if last[0] == 200:
                    break
            except LoadError as error:
                last = error
            time.sleep(POLL_S)
        else:
            raise ProgramError(f"{up.name} did not answer for {model}: {last}\n{up.program.tail()}")
