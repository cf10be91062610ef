"""A virtual environment for each peer, in `.bench/`, made at the first run and kept for the next."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.programs import ProgramError
from tests.benchmarks.workspace import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER = REPOSITORY / ".bench"
CONSTRAINTS = REPOSITORY / ".ci/constraints.txt"
MADE = "made"  # a file with what is in the environment
MAKE_TIMEOUT_S = 900.0
# What TorchServe's server and workers import; the handlers need torch.
PACKAGES = {
    "torchserve": ("torchserve==0.12.0", "torch", "numpy", "pyyaml", "psutil", "requests", "pillow", "packaging"),
    "mosec": ("mosec==0.9.8",),
    "litserve": ("litserve==0.2.19",),
    "ray": ("ray[serve]==2.60.0",),
}
PEERS = tuple(PACKAGES)


class PeerError(ProgramError):
    """A peer cannot be had here."""


@dataclass(frozen=True, slots=True)
class Environments:
    """Where the peers are.

    Attributes:
        chosen: the peers that shall run.
        given: environments that were made elsewhere, by peer.
        constraints: for pip: the torch of TorchServe's ranks is ours.
        failed: why one could not be made, so that it is tried once.
    """

    chosen: tuple[str, ...] = PEERS
    given: Mapping[str, Path] = field(default_factory=dict)
    constraints: Path = CONSTRAINTS
    failed: dict[str, str] = field(default_factory=dict)

    def bin(self, peer: str) -> Path:
        """The folder of its programs; makes the environment if there is none.

        Raises:
            PeerError: not chosen, or it cannot be made. The message says why.
        """
        if peer not in self.chosen:
            raise PeerError("not chosen")
        if peer == "torchserve" and shutil.which("java") is None:
            raise PeerError("there is no java (17)")
        if peer in self.given:
            return self.given[peer].absolute() / "bin"
        if peer in self.failed:
            raise PeerError(self.failed[peer])
        folder = FOLDER / peer
        made = folder / MADE
        if not made.exists() or made.read_text().split() != list(PACKAGES[peer]):
            self._make(peer, folder)
        return folder / "bin"

    def _make(self, peer: str, folder: Path) -> None:
        print(f"making an environment for {peer} in {folder}", file=sys.stderr, flush=True)
        python = str(folder / "bin/python")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "-c", str(self.constraints)]
        try:
            for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], [*pip, *PACKAGES[peer]]):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=MAKE_TIMEOUT_S)
        except subprocess.SubprocessError as error:
            shutil.rmtree(folder, ignore_errors=True)
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            why = next((line for line in lines if line.startswith("ERROR")), lines[-1])  # pip goes on with advice
            self.failed[peer] = f"its environment cannot be made: {why}"
            raise PeerError(self.failed[peer]) from error
        (folder / MADE).write_text("\n".join(PACKAGES[peer]))
