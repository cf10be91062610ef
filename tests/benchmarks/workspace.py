"""A temporary folder for all that a run leaves behind: model stores, runtime directory, logs. It goes with the run."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

REPOSITORY = Path(__file__).parents[2]
HANDLERS = Path(__file__).parent / "handlers"
MODELS = REPOSITORY / "configs/models"
ECHO = MODELS / "echo/handler.py"

# deviceType: a GPU on this machine must not change what is compared. jobQueueSize: no client may be turned away.
MODEL_CONFIG = """\
minWorkers: {model.workers}
maxWorkers: {model.workers}
batchSize: {model.batch_size}
maxBatchDelay: {delay}
jobQueueSize: 10000
deviceType: cpu
"""
PARALLEL = """\
parallelType: {model.parallel}
torchrun:
  nproc-per-node: {model.ranks}
"""


@dataclass(frozen=True, slots=True)
class Model:
    """What every server of a comparison serves.

    Attributes:
        files: the handler first, then what it imports.
        ranks: 0: one plain process, without torchrun.
        delay: maxBatchDelay, milliseconds.
        more: lines of model-config.yaml.
    """

    name: str
    files: tuple[Path, ...]
    ranks: int = 2
    batch_size: int = 1
    parallel: str = "tp"
    delay: int = 0
    more: str = ""
    workers: int = 1

    def config(self, least_delay: int = 0) -> str:
        """Its model-config.yaml.

        Args:
            least_delay: maxBatchDelay for a server that takes no 0.
        """
        text = MODEL_CONFIG.format(model=self, delay=max(self.delay, least_delay))
        return text + (PARALLEL.format(model=self) if self.ranks else "") + self.more


class Workspace:
    """The folder of one run; a context manager.

    Attributes:
        path: right under /tmp, for the worker sockets' addresses must stay under 107 bytes.
        environ: what the programs of this run get.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="msb-", dir="/tmp", ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        self._count = 0
        # One thread for a rank, on every side: minserve's default, and the machine has two cores.
        ours = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
        for name in ("XDG_RUNTIME_DIR", "TMPDIR", "TEMP"):
            ours[name] = str(self.path / name[:1].lower())
        for name in ("x", "t"):
            (self.path / name).mkdir(mode=0o700)
        self.environ = {**os.environ, **ours}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def new_folder(self, name: str) -> Path:
        """A folder that nobody else has."""
        self._count += 1
        folder = self.path / f"{self._count}-{name}"
        folder.mkdir()
        return folder

    def body(self, size: int) -> Path:
        """A file with a request's body of so many bytes: a JSON string, for LitServe reads nothing else."""
        file = self.path / f"body-{size}"
        if not file.exists():
            file.write_bytes(b'"%s"' % (b"x" * (size - 2)))
        return file

    def store(self, models: Iterable[Model], least_delay: int = 0) -> Path:
        """Writes a directory for each model and returns the model store they are in."""
        store = self.new_folder("store")
        for model in models:
            directory = store / model.name
            directory.mkdir()
            for file in model.files:
                (directory / (file.name if file != model.files[0] else "handler.py")).symlink_to(file)
            (directory / "model-config.yaml").write_text(model.config(least_delay))
        return store
