"""What somebody asks for when a model is registered."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Registration:
    """A model to register. What is None is not given: the model's YAML decides, then the server's options.

    Attributes:
        url: a file or folder of the model store, a path, or an address that `allowed_urls` allows.
        name: instead of the one in the manifest.
        handler: instead of the manifest's: `file.py[:name]`, or the name of a shipped handler.
        max_batch_delay: milliseconds.
        initial_workers: how many start; a YAML with minWorkers and maxWorkers has the say, as with TorchServe.
        response_timeout, startup_timeout: seconds.
    """

    url: str
    name: str | None = None
    handler: str | None = None
    runtime: str | None = None
    batch_size: int | None = None
    max_batch_delay: int | None = None
    initial_workers: int | None = None
    response_timeout: float | None = None
    startup_timeout: float | None = None
