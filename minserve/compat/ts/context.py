"""The context, under TorchServe's name."""

from minserve.rank.context import Context, RequestProcessor

__all__ = ["Context", "RequestProcessor"]
