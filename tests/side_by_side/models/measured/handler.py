"""Custom metrics of every kind."""

from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes


class Measured:
    """Emits metrics with each request."""

    def initialize(self, context):
        """One gauge at the start."""
        context.metrics.add_metric("InitializeCalls", 1, "count", dimensions=[Dimension("Level", "Model")])

    def handle(self, data, context):
        """One of each."""
        metrics = context.metrics
        metrics.add_counter("InferenceCalls", 1)
        metrics.add_time("Preprocess", 12.5, 0, "ms")
        metrics.add_size("Payload", 3, 0, "kB")
        metrics.add_percent("Share", 25, 0)
        metrics.add_metric("Examples", 2, "count", metric_type=MetricTypes.GAUGE)
        return ["measured"] * len(data)
