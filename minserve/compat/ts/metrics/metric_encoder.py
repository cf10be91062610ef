"""Metrics as JSON."""

from __future__ import annotations

from json import JSONEncoder

from minserve.rank.metrics import Dimension

from .metric import Metric


class MetricEncoder(JSONEncoder):
    """Encodes metrics and their labels."""

    def default(self, o: object) -> object:
        """A metric or a label as a dictionary."""
        return o.to_dict() if isinstance(o, Metric | Dimension) else super().default(o)
