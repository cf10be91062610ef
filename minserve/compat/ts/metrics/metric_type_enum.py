"""The kinds of metrics."""

from minserve.rank.metrics import MetricTypes

__all__ = ["MetricTypes"]
