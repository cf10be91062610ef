"""Finds things in an image."""

from __future__ import annotations

from typing import Any

from ..utils.util import map_class_to_label
from . import transforms
from .vision_handler import VisionHandler


class ObjectDetector(VisionHandler):
    """Answers each image with what is found in it: `{label: [x1, y1, x2, y2], "score": probability}` each.

    Attributes:
        threshold: the least score that is told.
    """

    image_processing = transforms.plain()
    threshold = 0.5

    def postprocess(self, data: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Turns what the model found, as boxes, labels and scores for each image, into answers."""
        return [self._describe(found) for found in data]

    def _describe(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        kept = found["scores"] >= self.threshold
        boxes, labels, scores = (found[key][kept].tolist() for key in ("boxes", "labels", "scores"))
        named = map_class_to_label([[box] for box in boxes], self.mapping, [[label] for label in labels])
        return [one | {"score": score} for one, score in zip(named, scores, strict=True)]
