"""Says of each pixel of an image what it shows."""

from __future__ import annotations

from typing import Any

import torch

from . import transforms
from .vision_handler import VisionHandler


class ImageSegmenter(VisionHandler):
    """Answers each image with its rows of pixels, each pixel as `[class, probability]`.

    The likeliest class alone: all of them would be answers of tens of megabytes.
    """

    image_processing = transforms.imagenet()

    def postprocess(self, data: dict[str, torch.Tensor]) -> Any:
        """Turns the model's logits, under "out" in the shape (images, classes, height, width), into answers."""
        best = torch.softmax(data["out"], dim=1).max(dim=1)
        return torch.stack([best.indices.to(best.values.dtype), best.values], dim=3).tolist()
