"""What of captum the handlers need. It is imported with the first explanation: most models never give one."""

from __future__ import annotations

import importlib
from typing import Any

from ..utils.util import PredictionException


def captum_class(name: str) -> Any:
    """A class of `captum.attr`.

    Raises:
        PredictionException: with status 501: captum is not installed.
    """
    try:
        return getattr(importlib.import_module("captum.attr"), name)
    except ModuleNotFoundError as error:
        if error.name != "captum":
            raise
        raise PredictionException(
            "explanations need the package captum: add it to the model's requirements.txt", 501
        ) from None


def target_of(row: object) -> Any:
    """The class to explain, which a request's field `target` names; 0 where it names none.

    From a form the field comes as bytes.

    Raises:
        PredictionException: with status 400: bytes or text that are no number.
    """
    target = row.get("target") if isinstance(row, dict) else None
    if not isinstance(target, bytes | bytearray | str):
        return target or 0
    try:
        return int(target or 0)
    except ValueError:
        raise PredictionException(f"target must be the number of a class, not {target!r}", 400) from None
