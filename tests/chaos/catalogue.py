"""The models that are made to fail, and the store that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HANDLERS = Path(__file__).parent / "models"

RESPONSE_S = 6.0
FIRST_BATCH_S = 10.0
STALL_S = 2.0
GRACE_S = 0.5
STREAM_STALL_S = 2.0

CONFIG = """\
minWorkers: 1
maxWorkers: {max_workers}
batchSize: {batch_size}
maxBatchDelay: 0
jobQueueSize: 1000
deviceType: cpu
responseTimeout: {response:g}
startupTimeout: {startup:g}
clientTimeoutInMills: 90000
maxRetryTimeoutInSec: 3600
{parallel}
minserve:
  acceptTimeout: {accept:g}
  firstBatchTimeout: {first_batch:g}
  stallTimeout: {stall:g}
  errorGrace: {grace:g}
  streamStallTimeout: {stream_stall:g}
  streamBuffer: 65536
  exitTimeout: 1
  drainTimeout: 10
  backoff: [0]
  scaleUpWait: 0.3
  scaleDownIdle: 2
{more}"""


@dataclass(frozen=True)
class Model:
    """A model of the store.

    Attributes:
        handler: file in `models/`: "plain", "tp", "pp" or "stream".
        weight: how often it is chosen, against the others; a start of four ranks costs ten times one of one process.
        options: further lines of the YAML's `minserve:` section.
    """

    name: str
    handler: str
    ranks: int = 1
    weight: int = 1
    batch_size: int = 4
    max_workers: int = 1
    options: tuple[str, ...] = ()
    accept_s: float = 60.0
    startup_s: float = 90.0

    @property
    def streams(self) -> bool:
        return self.handler == "stream"

    @property
    def retries(self) -> bool:
        return any(option.startswith("retryInFlight") for option in self.options)

    @property
    def scales(self) -> bool:
        return self.max_workers > 1

    @property
    def faulty(self) -> bool:
        """Whether any fault may be done to it; the others are there for one thing each."""
        return not self.retries and not self.scales

    def config(self) -> str:
        """Its model-config.yaml."""
        parallel_type = {"plain": "", "tp": "tp", "pp": "pp", "stream": "tp"}[self.handler]
        parallel = f"parallelType: {parallel_type}\ntorchrun:\n  nproc-per-node: {self.ranks}" if parallel_type else ""
        return CONFIG.format(
            max_workers=self.max_workers,
            batch_size=self.batch_size,
            response=RESPONSE_S,
            startup=self.startup_s,
            parallel=parallel,
            accept=self.accept_s,
            first_batch=FIRST_BATCH_S,
            stall=STALL_S,
            grace=GRACE_S,
            stream_stall=STREAM_STALL_S,
            more="".join(f"  {option}\n" for option in self.options),
        )


FULL = (
    Model("plain", "plain", weight=8, accept_s=3.0, startup_s=5.0),
    Model("plain-tcp", "plain", weight=4, accept_s=3.0, startup_s=5.0, options=("socketType: tcp",)),
    Model("tp1", "tp", ranks=1, weight=1),
    Model("tp2", "tp", ranks=2, weight=6, accept_s=20.0, startup_s=40.0),
    Model("tp2-tcp", "tp", ranks=2, weight=4, options=("socketType: tcp", "replyAfter: all")),
    Model("tp4", "tp", ranks=4, weight=5),
    Model("pp2", "pp", ranks=2, weight=4, options=("inFlight: 2",)),
    Model("stream2", "stream", ranks=2, weight=5, batch_size=2),
    Model("stream2-tcp", "stream", ranks=2, weight=2, batch_size=2, options=("socketType: tcp",)),
    Model("retries", "plain", options=("retryInFlight: 1",)),
    Model("scales", "plain", batch_size=1, max_workers=2),
)
_SHORT = ("plain", "tp2-tcp", "pp2", "stream2", "retries", "scales")
SHORT = tuple(model for model in FULL if model.name in _SHORT)


def build_store(store: Path, models: tuple[Model, ...]) -> None:
    """Writes the model directories."""
    for model in models:
        directory = store / model.name
        directory.mkdir(parents=True)
        (directory / "model-config.yaml").write_text(model.config())
        (directory / "handler.py").symlink_to(HANDLERS / f"{model.handler}.py")
