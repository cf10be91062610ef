"""The base of handlers that run a model with DeepSpeed."""

from __future__ import annotations

import os
from abc import ABC
from typing import TYPE_CHECKING

from ..base_handler import BaseHandler

if TYPE_CHECKING:
    from minserve.rank.context import Context


class BaseDeepSpeedHandler(BaseHandler, ABC):
    """Says which GPU is this rank's; the handler makes the model, and `get_ds_engine` the engine.

    Attributes:
        device: index of this rank's GPU.
    """

    def initialize(self, ctx: Context) -> None:
        """Sets `device`."""
        self.device = int(os.environ.get("LOCAL_RANK", "0"))
