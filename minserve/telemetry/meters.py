"""What is measured of one model version while its requests go by.

This is the hot path: every series is looked up once and kept, a batch is measured once for all its requests, and whoever
has a time already hands it over. Times are taken from a clock of microseconds: an event loop's own has milliseconds.
"""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING

from minserve.telemetry.declarations import (
    INFERENCES,
    LATENCY,
    LOAD_TIME,
    PREDICTION_TIME,
    QUEUE_LATENCY,
    QUEUE_TIME,
    THREAD_TIME,
)
from minserve.telemetry.metrics import HOST, Metrics
from minserve.telemetry.series import Histogram
from minserve.telemetry.torchserve_workers import worker_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from minserve.telemetry.recorded import Recorded
    from minserve.telemetry.series import Series

# Seconds. Fine below a millisecond, where our own overhead lies, and up to the usual responseTimeout.
STAGE_BOUNDS = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
DEFAULT_VERSION = "default"  # the label of a request that names no version


class ModelMeters:
    """The meters of one model version.

    Args:
        now: seconds on a clock of microseconds.

    Attributes:
        frontend, batch_wait, queue, broadcast, rank0: seconds that its requests spent in these stages, see
            `OWN_REQUEST_SECONDS`.
    """

    def __init__(
        self, metrics: Metrics, model: str, version: str, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._metrics = metrics
        self._model = model
        self._version = version
        self.now = now
        self._unnamed = _Inferences(metrics, model, DEFAULT_VERSION)
        self._named = _Inferences(metrics, model, version)
        self.frontend = Histogram(STAGE_BOUNDS)
        self.batch_wait = Histogram(STAGE_BOUNDS)
        self.queue = Histogram(STAGE_BOUNDS)
        self.broadcast = Histogram(STAGE_BOUNDS)
        self.rank0 = Histogram(STAGE_BOUNDS)

    @property
    def stages(self) -> dict[str, Histogram]:
        """The stages by name, in the order in which a request goes through them."""
        return {
            "frontend": self.frontend,
            "batch_wait": self.batch_wait,
            "queue": self.queue,
            "broadcast": self.broadcast,
            "rank0": self.rank0,
        }

    # ── of a request, in order; times are `now()` ──

    def arrived(self, named: bool) -> None:
        """Counts a request, whatever becomes of it.

        Args:
            named: it names the version.
        """
        (self._named if named else self._unnamed).requests.record(1.0)

    def left_queue(self, arrived: Sequence[float], due: float, sent: float) -> None:
        """Requests have become a batch.

        Args:
            due: when it could have gone, had a worker been free; 0 where no request waits for company.
        """
        if due:
            self.batch_wait.record_all([max(0.0, due - one) for one in arrived])
            arrived = [max(due, one) for one in arrived]
        self.queue.record_all([sent - one for one in arrived])

    def batch_sent(self, count: int, began: float, written: float) -> None:
        """A batch of so many requests has been written to every rank's socket."""
        self.broadcast.record_many(written - began, count)

    def batch_answered(self, count: int, written: float, replied: float, overhead: float) -> None:
        """Rank 0 has answered a batch.

        Args:
            overhead: seconds that the server itself spent on the batch, before the write and after the reply.
        """
        self.rank0.record_many(replied - written, count)
        self._thread_time.record(overhead * 1e3)

    def handled(self, seconds: float, request_ids: Iterable[str]) -> None:
        """Rank 0 was so long in `handle` for a batch of these requests."""
        self._prediction_time.record(round(seconds * 1e3, 2), ",".join(request_ids))

    def answered(self, named: bool, arrived: float, sent: float, now: float) -> None:
        """A request has its whole answer, which is no error."""
        series = self._named if named else self._unnamed
        waited = sent - arrived
        series.latency.record((now - arrived) * 1e6)
        series.queue_latency.record(waited * 1e6)
        self._queue_time.record(waited * 1e3)

    # ── of a worker ──

    def loaded(self, worker: int, seconds: float) -> None:
        """A worker is READY, so many seconds after its start."""
        name = worker_name(self._model, self._version, worker)
        self._metrics.of_server(LOAD_TIME, name, HOST).record(round(seconds * 1e3))

    def from_rank(self, rank: int, values: Iterable[Recorded]) -> None:
        """A rank has sent what its handler has recorded."""
        self._metrics.from_rank(rank, values)

    @cached_property
    def _thread_time(self) -> Series:
        return self._metrics.of_server(THREAD_TIME, HOST)

    @cached_property
    def _prediction_time(self) -> Series:
        return self._metrics.of_rank0(PREDICTION_TIME, self._model, "Model")

    @cached_property
    def _queue_time(self) -> Series:
        return self._metrics.of_server(QUEUE_TIME, HOST)


class _Inferences:
    """The series of a model's requests that name its version, or of those that do not. Each is made with its first value."""

    def __init__(self, metrics: Metrics, model: str, version: str) -> None:
        self._metrics = metrics
        self._labels = (model, version)

    @cached_property
    def requests(self) -> Series:
        return self._metrics.of_server(INFERENCES, *self._labels)

    @cached_property
    def latency(self) -> Series:
        return self._metrics.of_server(LATENCY, *self._labels)

    @cached_property
    def queue_latency(self) -> Series:
        return self._metrics.of_server(QUEUE_LATENCY, *self._labels)


def unwatched() -> ModelMeters:
    """Meters that nobody reads."""
    return ModelMeters(Metrics(), "", "")
