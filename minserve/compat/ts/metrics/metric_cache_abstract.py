"""The class of `context.metrics`, by which handlers annotate; there is one implementation here."""

from minserve.rank.metric_cache import MetricsCache as MetricCacheAbstract

__all__ = ["MetricCacheAbstract"]
