"""A temporary folder that holds all that a run leaves behind: model store, runtime directory, logs. It goes with the run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

REPOSITORY = Path(__file__).parents[2]
ECHO_HANDLER = REPOSITORY / "configs/models/echo/handler.py"

# deviceType: a GPU on this machine must not change what is compared. jobQueueSize: no client may be turned away.
MODEL_CONFIG = """\
minWorkers: 1
maxWorkers: 1
batchSize: {batch_size}
maxBatchDelay: 0
jobQueueSize: 1000
deviceType: cpu
parallelType: tp
torchrun:
  nproc-per-node: {ranks}
"""


class Workspace:
    """The folder of one run; a context manager.

    Attributes:
        path: right under /tmp, for the worker sockets' addresses must stay under 107 bytes.
        environ: what the programs of this run get.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="msb-", dir="/tmp")
        self.path = Path(self._folder.name)
        self.environ = {**os.environ, "XDG_RUNTIME_DIR": str(self.path / "run"), "TMPDIR": str(self.path / "tmp")}
        for name in ("run", "tmp"):
            (self.path / name).mkdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def add_model(self, store: str, name: str, handler: Path, *, ranks: int, batch_size: int) -> Path:
        """Writes a model directory and returns the model store it is in."""
        directory = self.path / store / name
        directory.mkdir(parents=True)
        (directory / "handler.py").symlink_to(handler)
        (directory / "model-config.yaml").write_text(MODEL_CONFIG.format(ranks=ranks, batch_size=batch_size))
        return directory.parent
