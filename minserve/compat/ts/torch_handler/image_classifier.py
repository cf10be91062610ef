"""Names what an image shows."""

from __future__ import annotations

from typing import Any

import torch

from ..handler_utils.timer import timed
from ..utils.util import map_class_to_label
from . import transforms
from .vision_handler import VisionHandler


class ImageClassifier(VisionHandler):
    """Answers each image with its likeliest classes: `{label: probability}`, the likeliest first.

    Attributes:
        topk: how many.
    """

    topk = 5
    image_processing = transforms.imagenet()

    def set_max_result_classes(self, topk: int) -> None:
        """Sets how many classes an answer has."""
        self.topk = topk

    def get_max_result_classes(self) -> int:
        """How many classes an answer has."""
        return self.topk

    @timed
    def postprocess(self, data: torch.Tensor) -> list[dict[str, Any]]:
        """Turns the model's logits, of shape (images, classes), into answers."""
        probabilities = torch.softmax(data, dim=1)
        best, classes = torch.topk(probabilities, min(self.topk, data.shape[1]), dim=1)
        return map_class_to_label(best.tolist(), self.mapping, classes.tolist())
