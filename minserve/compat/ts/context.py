"""The context, under TorchServe's name."""

from minserve.rank.context import Context
from minserve.rank.requests import RequestProcessor

__all__ = ["Context", "RequestProcessor"]
