"""The load of a rank group: what each rank is told, and how far each one is."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from minserve.wire.frames import Kind
from minserve.wire.messages import Load, Loaded, Progress, pack_with_body

if TYPE_CHECKING:
    from minserve.wire.messages import Buffer, Failure
    from minserve.worker.spec import ModelSpec

logger = logging.getLogger(__name__)


class Loading:
    """Keeps what the ranks tell of their load.

    Args:
        who: "model/worker number" for messages.

    Attributes:
        complete: set once every rank has loaded.
        errors: by rank: type, text and place of what its handler has raised.
    """

    def __init__(self, spec: ModelSpec, who: str) -> None:
        self._spec = spec
        self._who = who
        self._progress: dict[int, Progress] = {}
        self._loaded: dict[int, Loaded] = {}
        self.complete = asyncio.Event()
        self.errors: dict[int, str] = {}

    def frame(self, gpu: bool) -> list[Buffer]:
        """LOAD, the same for every rank.

        Args:
            gpu: whether the worker has devices.
        """
        spec, options = self._spec, self._spec.config.minserve
        message = Load(
            spec.name,
            spec.version,
            str(spec.model_dir),
            spec.handler,
            spec.config.batch_size,
            gpu,
            options.reply_after == "all",
            spec.manifest,
            spec.envelope,
            spec.limit_max_image_pixels,
            spec.decode_input,
            predict_on=options.predict_on,
            metrics=spec.metrics,
            asynchronous=spec.asynchronous,
            in_flight=options.in_flight or 0,
            views=options.bodies == "view",
            spin=options.spin_micros / 1e6,
            wait_for_cores=options.scheduling == "batch",
        )
        return pack_with_body(Kind.LOAD, message, [spec.yaml], 0)

    def progressed(self, rank: int, progress: Progress) -> None:
        """A rank tells how far it is."""
        self._progress[rank] = progress
        logger.info("%s rank %d: %s", self._who, rank, self.stage(rank))

    def loaded(self, rank: int, loaded: Loaded) -> None:
        """A rank has loaded."""
        self._loaded[rank] = loaded
        logger.debug("%s rank %d: loaded in %.1f s", self._who, rank, loaded.seconds)
        if len(self._loaded) == self._spec.world_size:
            self.complete.set()

    def failed(self, rank: int, failure: Failure) -> None:
        """A rank cannot load."""
        text = f"{failure.type_name}: {failure.text} at {failure.place}"
        logger.error("%s rank %d cannot load: %s\n%s", self._who, rank, text, failure.traceback.rstrip())
        self.errors[rank] = text

    @property
    def probes(self) -> bool:
        """Whether the handler offers a probe."""
        return any(loaded.probes for loaded in self._loaded.values())

    @property
    def in_flight(self) -> int:
        """How many batches the ranks can have at work at once; 0: they have not said."""
        return min((loaded.in_flight for loaded in self._loaded.values()), default=0)

    @property
    def behind(self) -> list[int]:
        """The ranks that have not loaded yet."""
        return [rank for rank in range(self._spec.world_size) if rank not in self._loaded]

    def stage(self, rank: int) -> str:
        """How far a rank is, in words."""
        if rank in self._loaded:
            return "loaded"
        progress = self._progress.get(rank)
        if progress is None:
            return "importing"
        return f"{progress.stage} {progress.done} of {progress.total}" if progress.total else progress.stage
