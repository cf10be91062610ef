"""One metric, to which values are given."""

from minserve.rank.metrics import CachingMetric

__all__ = ["CachingMetric"]
