"""Where older handlers import the exception from."""

from .utils.util import PredictionException

__all__ = ["PredictionException"]
