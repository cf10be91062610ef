"""The image transforms that the shipped handlers use: torchvision's, or where that is not installed our own.

Ours give what torchvision gives for a Pillow image, number by number, so that a TorchScript classifier needs Pillow alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by channel
_WIDE = {"I": torch.int32, "I;16": torch.int16, "F": torch.float32}  # kinds of Pillow images with other than 8 bits


class Compose:
    """Transforms one after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Any:
        """What all of them make of an image."""
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    """Makes the shorter side of an image `size` pixels long; the other keeps its proportion."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        """The image in its new size."""
        width, height = image.size
        short, long = sorted((width, height))
        if short == self.size:
            return image
        other = int(self.size * long / short)
        return image.resize((self.size, other) if width <= height else (other, self.size), _pillow().BILINEAR)


class CenterCrop:
    """Cuts a square of `size` pixels out of the middle; an image that is smaller gets black edges."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        """The square."""
        width, height = image.size
        if width < self.size or height < self.size:
            padded = _pillow().new(image.mode, (max(width, self.size), max(height, self.size)))
            padded.paste(image, (max(0, self.size - width) // 2, max(0, self.size - height) // 2))
            image, (width, height) = padded, padded.size
        left, top = round((width - self.size) / 2.0), round((height - self.size) / 2.0)
        return image.crop((left, top, left + self.size, top + self.size))


class ToTensor:
    """An image as a tensor of shape (channels, height, width): 8 bits become 0.0 … 1.0, wider ones stay as they are."""

    def __call__(self, image: Any) -> torch.Tensor:
        """The tensor."""
        dtype = _WIDE.get(image.mode)
        if image.mode == "1":
            image = image.convert("L")
        flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8 if dtype is None else dtype)
        tensor = flat.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()
        return tensor.to(torch.get_default_dtype()).div(255) if dtype is None else tensor


class Normalize:
    """Subtracts the mean of each channel and divides by its standard deviation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean, std

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new tensor of the same shape."""
        mean, std = (torch.as_tensor(values, dtype=tensor.dtype).view(-1, 1, 1) for values in (self.mean, self.std))
        return tensor.clone().sub_(mean).div_(std)


def imagenet() -> Any:
    """What ImageNet's models are trained with: 256 pixels, the 224 in the middle, normalized."""
    kit = _kit()
    return kit.Compose(
        [kit.Resize(256), kit.CenterCrop(224), kit.ToTensor(), kit.Normalize(mean=list(MEAN), std=list(STD))]
    )


def plain() -> Any:
    """The image as it is, as a tensor."""
    kit = _kit()
    return kit.Compose([kit.ToTensor()])


def _kit() -> Any:
    name = "torchvision.transforms" if importlib.util.find_spec("torchvision") else __name__
    return importlib.import_module(name)


def _pillow() -> Any:
    return importlib.import_module("PIL.Image")
