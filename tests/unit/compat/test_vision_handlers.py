"""The handlers for images, with models so small that their answers can be worked out, and the transforms before them."""

from __future__ import annotations

import base64
import builtins
import importlib.util
import io
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from minserve.compat.ts.torch_handler import transforms
from minserve.compat.ts.torch_handler.image_classifier import ImageClassifier
from minserve.compat.ts.torch_handler.image_segmenter import ImageSegmenter
from minserve.compat.ts.torch_handler.object_detector import ObjectDetector
from minserve.compat.ts.torch_handler.vision_handler import VisionHandler
from minserve.compat.ts.utils.util import PredictionException
from tests.unit.compat.conftest import MakeContext

Tensor = torch.Tensor


def image(color: str = "red", size: tuple[int, int] = (300, 260), kind: str = "PNG") -> bytearray:
    Image.new("RGB", size, color).save(buffer := io.BytesIO(), kind)
    return bytearray(buffer.getvalue())


def ready(kind: type[VisionHandler], model: Callable[[Tensor], Any], context: Any) -> Any:
    """The handler with this model in place of the archive's."""
    handler = kind()
    handler.initialize(context)
    handler.model = model
    return handler


def means(images: Tensor) -> Tensor:
    """As logits, ten times the mean of each channel: what is red is likeliest class 0."""
    return images.mean((2, 3)) * 10


# ── handlers ──


def test_an_image_is_classified_however_it_is_sent(make_context: MakeContext) -> None:
    context = make_context(count=4)
    context.system_properties["limit_max_image_pixels"] = True
    handler = ready(ImageClassifier, means, context)
    handler.mapping = {"0": "red", "1": "green", "2": "blue"}
    handler.set_max_result_classes(2)
    data = [
        {"body": image("red")},
        {"data": bytes(image("lime", (500, 100), "JPEG"))},
        {"body": base64.b64encode(image("blue")).decode()},
        {"body": torch.eye(3)[0].view(3, 1, 1).expand(3, 224, 224).tolist()},  # a tensor as JSON has it, not an image
    ]
    answers = handler.handle(data, context)
    assert [next(iter(answer)) for answer in answers] == ["red", "green", "blue", "red"]
    assert all(len(answer) == 2 and sum(answer.values()) < 1.0001 for answer in answers)
    assert list(answers[3].values()) == pytest.approx(torch.softmax(torch.tensor([10.0, 0, 0]), 0)[:2].tolist())


def test_a_model_of_fewer_classes_than_are_asked_for_gives_them_all(make_context: MakeContext) -> None:
    context = make_context()
    handler = ready(ImageClassifier, means, context)
    handler.mapping = None
    assert handler.get_max_result_classes() == 5
    assert set(handler.handle([{"body": image()}], context)[0]) == {"0", "1", "2"}


def test_a_segmenter_says_class_and_probability_of_each_pixel(make_context: MakeContext) -> None:
    context = make_context(count=2)
    handler = ready(ImageSegmenter, lambda images: {"out": images * 1000}, context)
    answers = handler.handle([{"body": image("red")}, {"body": image("blue")}], context)
    assert (len(answers), len(answers[0]), len(answers[0][0])) == (2, 224, 224)
    assert (answers[0][5][7], answers[1][0][0]) == ([0.0, 1.0], [2.0, 1.0])


def test_a_detector_gives_what_reaches_the_threshold(make_context: MakeContext) -> None:
    found = {
        "boxes": torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        "labels": torch.tensor([1, 0, 1]),
        "scores": torch.tensor([0.75, 0.25, 0.5]),
    }
    seen = []

    def model(images: Tensor) -> list[dict[str, Tensor]]:
        seen.append(images.shape)
        return [found, {key: value[:0] for key, value in found.items()}]

    context = make_context(count=2)
    handler = ready(ObjectDetector, model, context)
    assert handler.handle([{"body": image(size=(30, 20))}] * 2, context) == [
        [{"dog": [0.0, 1.0, 2.0, 3.0], "score": 0.75}, {"dog": [8.0, 9.0, 10.0, 11.0], "score": 0.5}],
        [],
    ]
    assert seen == [(2, 3, 20, 30)]  # in the size it came


@pytest.mark.parametrize("row", [{}, {"body": bytearray()}])
def test_a_request_without_an_image_is_refused(make_context: MakeContext, row: dict[str, object]) -> None:
    context = make_context()
    with pytest.raises(PredictionException, match="no image") as caught:
        ready(ImageClassifier, means, context).handle([row], context)
    assert caught.value.error_code == 400


def test_images_of_any_size_only_where_the_server_allows_them(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    context = make_context()
    handler = ready(ImageClassifier, means, context)
    with pytest.raises(Image.DecompressionBombError):
        handler.handle([{"body": image()}], context)
    context.system_properties["limit_max_image_pixels"] = False
    handler.initialize(context)
    handler.model, handler.mapping = means, None
    assert len(handler.handle([{"body": image()}], context)) == 1


def test_an_explanation_has_the_shape_of_the_images(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    captum: Any = ModuleType("captum.attr")
    made = []

    def gradients(model: object) -> object:
        made.append(model)
        return SimpleNamespace(attribute=lambda images, target, n_steps: images * 0 + target)

    captum.IntegratedGradients = gradients
    monkeypatch.setitem(sys.modules, "captum", ModuleType("captum"))
    monkeypatch.setitem(sys.modules, "captum.attr", captum)
    context = make_context(headers={"explain": "True"})
    handler = ready(ImageClassifier, means, context)
    for _ in range(2):
        (answer,) = handler.handle([{"body": image(), "target": bytearray(b"2")}], context)
        assert (len(answer), len(answer[0]), answer[2][223]) == (3, 224, [2.0] * 224)
    assert made == [means]


def test_without_pillow_the_import_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "PIL":
            raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
        return real(name, *args)

    home = "minserve.compat.ts.torch_handler.vision_handler"
    monkeypatch.delitem(sys.modules, home)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match="need the package Pillow"):
        importlib.import_module(home)


# ── transforms: the numbers are torchvision's, taken from it ──


@pytest.mark.parametrize(
    ("size", "resized"),
    [((300, 200), (384, 256)), ((200, 299), (256, 382)), ((256, 900), (256, 900)), ((1000, 3), (85333, 256))],
)
def test_resize_sets_the_shorter_side(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert transforms.Resize(256)(Image.new("L", size)).size == resized


def test_the_crop_is_in_the_middle_and_pads_what_is_too_small() -> None:
    strip = Image.frombytes("L", (7, 1), bytes(range(1, 8)))
    assert list(transforms.CenterCrop(3)(strip).tobytes()) == [0, 0, 0, 3, 4, 5, 0, 0, 0]
    assert list(transforms.CenterCrop(4)(strip).tobytes()[4:8]) == [3, 4, 5, 6]  # 1.5 to the even 2
    assert list(transforms.CenterCrop(2)(strip).tobytes()) == [3, 4, 0, 0]


@pytest.mark.parametrize(
    ("mode", "pixels", "values", "dtype"),
    [
        ("RGB", bytes([255, 0, 51]), [1.0, 0.0, 0.2], torch.float32),
        ("L", bytes([51]), [0.2], torch.float32),
        ("1", bytes([128]), [1.0], torch.float32),
        ("I", (70000).to_bytes(4, sys.byteorder), [70000], torch.int32),
    ],
)
def test_a_tensor_has_the_channels_first(mode: str, pixels: bytes, values: list[float], dtype: torch.dtype) -> None:
    tensor = transforms.ToTensor()(Image.frombytes(mode, (1, 1), pixels))
    assert tensor.shape == (len(values), 1, 1)
    assert tensor.dtype == dtype
    assert tensor.flatten().tolist() == pytest.approx(values)


def test_normalize_works_by_channel_and_refuses_other_channels() -> None:
    normalize = transforms.Normalize([0.5, 0.0], [0.5, 2.0])
    before = torch.ones(2, 1, 1)
    assert normalize(before).flatten().tolist() == [1.0, 0.5]
    assert before.flatten().tolist() == [1.0, 1.0]
    with pytest.raises(RuntimeError, match="broadcast"):
        normalize(torch.ones(1, 1, 1))


def test_torchvisions_are_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    kit: Any = ModuleType("torchvision.transforms")
    kit.Compose, kit.ToTensor = tuple, lambda: "theirs"
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", kit)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert transforms.plain() == ("theirs",)
