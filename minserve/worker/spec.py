"""What a worker is told to serve: one model version, with every default resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minserve.worker.outstanding import Limits

if TYPE_CHECKING:
    from pathlib import Path

    from minserve.config.model import ModelConfig


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

    @property
    def limits(self) -> Limits:
        """The limits of one worker's batches."""
        options = self.config.minserve
        first = options.first_batch_timeout
        return Limits(
            in_flight=options.in_flight or 1,
            response_timeout=self.response_timeout,
            first_batch_timeout=5 * self.response_timeout if first is None else first,
            error_grace=options.error_grace,
            reply_after_all=options.reply_after == "all",
            stall_timeout=options.stall_timeout,
            stream_ahead=options.stream_ahead,
            stream_buffer=options.stream_buffer,
        )

    @property
    def request_timeout(self) -> float:
        """Seconds from a request's arrival to its deadline."""
        if self.config.client_timeout_in_mills:
            return self.config.client_timeout_in_mills / 1000
        queue = self.config.minserve.queue_timeout
        return (self.response_timeout if queue is None else queue) + self.response_timeout
