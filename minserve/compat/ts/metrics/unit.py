"""The units that have a name of their own."""

from minserve.rank.metrics import UNITS


class Units:
    """The units: what a handler writes, and the name in full."""

    def __init__(self) -> None:
        self.units = dict(UNITS)
