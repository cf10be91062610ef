"""What handlers and their helpers share: labels, classes of a module, names of backends, an exception with a status."""

from __future__ import annotations

import enum
import functools
import inspect
import json
import logging
import re
import warnings
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence
    from types import ModuleType

logger = logging.getLogger(__name__)

CLEANUP_REGEX = re.compile(r"<.*?>|&([a-z0-9]+|#[0-9]{1,6}|#x[0-9a-f]{1,6});")
"""Tags and character references of HTML."""


class PT2Backend(enum.StrEnum):
    """The backends of torch.compile that a model's YAML may ask for."""

    EAGER = "eager"
    AOT_EAGER = "aot_eager"
    INDUCTOR = "inductor"
    NVFUSER = "nvfuser"
    AOT_NVFUSER = "aot_nvfuser"
    AOT_CUDAGRAPHS = "aot_cudagraphs"
    OFI = "ofi"
    FX2TRT = "fx2trt"
    ONNXRT = "onnxrt"
    IPEX = "ipex"
    TORCHXLA_TRACE_ONCE = "torchxla_trace_once"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    HPU_BACKEND = "hpu_backend"


class PredictionException(Exception):
    """Fails the whole batch with `error_code` as the HTTP status."""

    def __init__(self, message: str, error_code: int = 500) -> None:
        self.message = message
        self.error_code = error_code
        super().__init__(message)

    def __str__(self) -> str:
        return self.message


def check_valid_pt2_backend(backend: str) -> bool:
    """Whether it is one of `PT2Backend`; if not, the log says so."""
    known = [member.value for member in PT2Backend]
    if backend not in known:
        logger.warning("%s is not a supported backend; there are %s", backend, ", ".join(known))
    return backend in known


def list_classes_from_module(module: ModuleType, parent_class: type | None = None) -> list[type]:
    """The classes that a module itself defines, in the order of their names.

    Args:
        parent_class: only this one and those derived from it.
    """
    own = [value for _, value in inspect.getmembers(module, inspect.isclass) if value.__module__ == module.__name__]
    return [value for value in own if parent_class is None or issubclass(value, parent_class)]


def load_label_mapping(mapping_file_path: str | os.PathLike[str]) -> dict[str, str] | None:
    """Reads index_to_name.json.

    It is `{"0": "cat"}`, `{"0": ["n01", "cat"]}`, where the last counts, or `{"object_type_names": ["cat"]}`.

    Returns:
        {class number as text: label}; None where there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        with open(mapping_file_path, encoding="utf-8") as file:
            mapping = json.load(file)
    except FileNotFoundError:
        logger.warning("%r is missing. Inference output will not include class name.", str(mapping_file_path))
        return None
    except ValueError as error:
        raise ValueError(f"{mapping_file_path} is not JSON: {error}") from None
    if not isinstance(mapping, dict):
        raise ValueError(f'{mapping_file_path} must be an object like {{"0": "label"}}, not {type(mapping).__name__}')
    names = mapping.get("object_type_names")
    if isinstance(names, list):
        mapping = {str(number): name for number, name in enumerate(names)}
    return {key: _label(mapping_file_path, key, value) for key, value in mapping.items()}


def _label(file: str | os.PathLike[str], key: str, value: object) -> str:
    last = value[-1] if isinstance(value, list) and value else value
    if not isinstance(last, str):
        raise ValueError(f"{file}: the label of {key!r} must be a string or a list of strings, not {value!r}")
    return last


def map_class_to_label(
    probs: Sequence[Sequence[Any]],
    mapping: dict[str, str] | None = None,
    lbl_classes: Iterable[Iterable[Any]] | None = None,
) -> list[dict[str, Any]]:
    """One `{label: probability}` for each row of `probs`.

    Args:
        mapping: labels by class number as text; None: the number is the label.
        lbl_classes: the classes that the probabilities are of, row by row; None: 0, 1, 2 …

    Raises:
        TypeError: `probs` is no list, or `mapping` no dict.
        KeyError: a class has no label.
    """
    if not isinstance(probs, list):
        raise TypeError(f"probabilities must be a list, not a {type(probs).__name__}")
    if mapping is not None and not isinstance(mapping, dict):
        raise TypeError(f"mapping must be a dict, not a {type(mapping).__name__}")
    rows = lbl_classes if lbl_classes is not None else [range(len(row)) for row in probs]
    return [
        {
            str(number) if mapping is None else mapping[str(number)]: prob
            for number, prob in zip(numbers, row, strict=False)
        }
        for numbers, row in zip(rows, probs, strict=False)
    ]


def get_yaml_config(yaml_file_path: str | os.PathLike[str]) -> dict[str, Any]:
    """A YAML file as a dict; an empty one is an empty dict."""
    with open(yaml_file_path, encoding="utf-8") as file:
        return yaml.safe_load(file) or {}


def deprecated(
    version: str, replacement: str = "", klass: type[Warning] = PendingDeprecationWarning
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a function as one that goes away: each call warns.

    Args:
        version: the one without it.
        replacement: what to call in its place.
        klass: of the warning.
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            moved = f" and moved to {replacement}" if replacement else ""
            warnings.warn(f"{function.__name__} is deprecated in {version}{moved}", klass, stacklevel=2)
            return function(*args, **kwargs)

        return call

    return mark
