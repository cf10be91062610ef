"""What a worker is told to serve: one model version, with every default resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from minserve.worker.outstanding import Limits

if TYPE_CHECKING:
    from pathlib import Path

    from minserve.config.model import ModelConfig


Launcher = Literal["", "warm", "torchrun"]
USUAL_VERSION = "1.0"  # of a model that names none


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model version.

    Attributes:
        model_dir: absolute path of the model directory.
        yaml: text of its model-config.yaml, which each rank parses for the author's sections.
        world_size: ranks of one worker.
        response_timeout, startup_timeout: seconds; the YAML's, else the server's.
        queue_limit: most requests that wait.
        debug: whether the ranks log at DEBUG.
        bare_log: whether handlers' log lines are the message alone, as TorchServe has them.
        handler: `file.py[:name]`, or the name of a shipped handler such as `image_classifier`.
        manifest: text of MANIFEST.json; "" for a model directory without one.
        envelope: name of the request envelope; "" for none.
        url: what the model was registered under: a file of the store, a path, an address.
        runtime: of the manifest: python or python3.
        limit_max_image_pixels, decode_input: the server's options, for the ranks.
        metrics: the declared model metrics as JSON, see `Load.metrics`.
        launcher: what starts its processes: warm, torchrun, or "": the warm launcher where it is worth it.
        python: interpreter of the model's own virtual environment; "" for the server's.
    """

    name: str
    version: str
    model_dir: Path
    config: ModelConfig
    yaml: bytes
    world_size: int
    response_timeout: float
    startup_timeout: float
    queue_limit: int
    debug: bool = False
    bare_log: bool = False
    handler: str = "handler.py"
    manifest: str = ""
    envelope: str = ""
    url: str = ""
    runtime: str = "python"
    limit_max_image_pixels: bool = True
    decode_input: bool = True
    metrics: str = ""
    launcher: Launcher = ""
    python: str = ""

    @property
    def title(self) -> str:
        """The name, with the version unless that is the usual one: what messages, and owners of devices, go by."""
        return self.name if self.version == USUAL_VERSION else f"{self.name}:{self.version}"

    @property
    def limits(self) -> Limits:
        """The limits of one worker's batches."""
        options = self.config.minserve
        first = options.first_batch_timeout
        return Limits(
            in_flight=options.in_flight or (self.queue_limit if self.asynchronous else None),
            response_timeout=self.response_timeout,
            first_batch_timeout=5 * self.response_timeout if first is None else first,
            error_grace=options.error_grace,
            reply_after_all=options.reply_after == "all",
            stall_timeout=options.stall_timeout,
            stream_ahead=options.stream_ahead,
            stream_buffer=options.stream_buffer,
            any_order=self.asynchronous,
        )

    @property
    def asynchronous(self) -> bool:
        """Whether a worker has many requests under way and answers them in any order: never with several ranks."""
        return self.config.async_communication and self.world_size == 1

    @property
    def request_timeout(self) -> float:
        """Seconds from a request's arrival to its deadline."""
        if self.config.client_timeout_in_mills:
            return self.config.client_timeout_in_mills / 1000
        queue = self.config.minserve.queue_timeout
        return (self.response_timeout if queue is None else queue) + self.response_timeout

    @property
    def longest_drain(self) -> float:
        """Seconds for what a worker has in flight when the server serves on without it: as long as any batch may take."""
        return max(self.config.minserve.drain_timeout, self.response_timeout)
