"""The metrics of a model: the class of `context.metrics`."""

from minserve.rank.metric_cache import MetricsCache as MetricsCacheYamlImpl

__all__ = ["MetricsCacheYamlImpl"]
