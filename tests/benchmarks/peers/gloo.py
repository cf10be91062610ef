"""gloo alone: two ranks under plain torchrun that do nothing but all-reduce. No handler with one can be faster."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from tests.benchmarks.contest import Load
from tests.benchmarks.programs import Program
from tests.benchmarks.workspace import HANDLERS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.benchmarks.workspace import Workspace

GLOO = "gloo alone"


def torchrun(script: Path, folder: Path, ranks: int = 2) -> list[str]:
    """The command that minserve gives to torchrun, for a script of one's own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-endpoint", str(folder / "rdzv")]
    command += ["--rdzv-id", "0", "--local-addr", "127.0.0.1", "--max-restarts", "0"]
    return [*command, "--log-dir", str(folder / "elastic"), str(script)]


class Gloo:
    """The contestant. Its requests are all-reduces."""

    name = GLOO

    def __init__(self, program: Program) -> None:
        self._program = program
        self._turns = 0

    def check(self) -> None:
        """Its ranks have met."""
        self._program.wait_for("^ready$")

    def turn(self, seconds: int) -> Load:
        """All-reduces, one after the other."""
        self._turns += 1
        self._program.say(f"{self._turns} {seconds}")
        match = self._program.wait_for(rf"^{self._turns}: (?P<count>\d+) in (?P<took>\S+) s$")
        rate = int(match["count"]) / float(match["took"])
        return Load(rate, 1e6 / rate, 1e6 / rate)


@contextlib.contextmanager
def gloo_alone(workspace: Workspace) -> Iterator[Gloo]:
    """Both ranks, waiting."""
    command = torchrun(HANDLERS / "gloo.py", workspace.new_folder("gloo"))
    with Program(workspace, "gloo", command) as program:
        yield Gloo(program)
