"""What handlers import from TorchServe's service: an exception, and the end of a batch's older metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.rank.context import Context

from .utils.util import PredictionException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from minserve.rank.metric_cache import MetricsCache

    from .metrics.metric import Metric

__all__ = ["PREDICTION_METRIC", "PredictionException", "Service", "emit_metrics"]

PREDICTION_METRIC = "PredictionTime"


class Service:
    """A handler and its context, as authors' tests put them together. minserve itself calls handlers without it."""

    def __init__(
        self,
        model_name: str,
        model_dir: str,
        manifest: Mapping[str, object],
        entry_point: Callable[..., object],
        gpu: int | None,
        batch_size: int,
        limit_max_image_pixels: bool = True,
        metrics_cache: MetricsCache | None = None,
    ) -> None:
        self._entry_point = entry_point
        self._context = Context(
            model_name, model_dir, manifest, batch_size, gpu, "", limit_max_image_pixels, metrics_cache
        )

    @property
    def context(self) -> Context:
        """The handler's context."""
        return self._context


def emit_metrics(metrics: Iterable[Metric]) -> None:
    """Records what a `MetricsStore` has collected, so that it leaves with the batch."""
    for metric in metrics:
        metric.emit()
