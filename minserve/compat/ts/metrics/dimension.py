"""A label of a metric."""

from minserve.rank.metrics import Dimension

__all__ = ["Dimension"]
