"""The base of handlers that take images."""

from __future__ import annotations

import base64
import functools
import io
from abc import ABC
from typing import TYPE_CHECKING, Any

import torch

try:
    from PIL import Image
except ModuleNotFoundError as error:
    if error.name != "PIL":
        raise
    raise ModuleNotFoundError(
        "handlers that take images need the package Pillow: add it to the model's requirements.txt", name="PIL"
    ) from None

from ..handler_utils.timer import timed
from ..utils.util import PredictionException
from .base_handler import BaseHandler
from .explaining import captum_class

if TYPE_CHECKING:
    from minserve.rank.context import Context


class VisionHandler(BaseHandler, ABC):
    """Turns images into a tensor; what is done to each is `image_processing`, which handlers define.

    Attributes:
        image_processing: from a Pillow image to a tensor.
    """

    image_processing: Any

    def initialize(self, context: Context) -> None:
        """Loads the model, and lets Pillow take images of any size where the server's `limit_max_image_pixels` is off."""
        super().initialize(context)
        if not context.system_properties.get("limit_max_image_pixels", True):
            Image.MAX_IMAGE_PIXELS = None

    @functools.cached_property
    def ig(self) -> Any:
        """Captum's integrated gradients of the model."""
        return captum_class("IntegratedGradients")(self.model)

    @timed
    def preprocess(self, data: list[dict[str, Any]]) -> torch.Tensor:
        """Turns the requests into one tensor of shape (requests, channels, height, width).

        Args:
            data: the field `data` or `body` of each is an image file as bytes, or in base64 as text, or a list of numbers.

        Raises:
            PredictionException: with status 400: a request has no image.
        """
        return torch.stack([self._to_tensor(row.get("data") or row.get("body")) for row in data]).to(self.device)

    def get_insights(self, tensor_data: torch.Tensor, _: Any, target: Any = 0) -> Any:
        """How much each value of each pixel counts for the class `target`."""
        return self.ig.attribute(tensor_data, target=target, n_steps=15).tolist()

    def _to_tensor(self, image: Any) -> Any:
        if not image:
            raise PredictionException(
                "there is no image in the request: send it as its body, or as the field data", 400
            )
        if isinstance(image, str):
            image = base64.b64decode(image)
        if isinstance(image, bytes | bytearray):
            return self.image_processing(Image.open(io.BytesIO(image)))
        return torch.as_tensor(image, dtype=torch.float32)
