"""The class of all metrics, by which handlers annotate; there is one kind of them here."""

from minserve.rank.metrics import CachingMetric as MetricAbstract

__all__ = ["MetricAbstract"]
