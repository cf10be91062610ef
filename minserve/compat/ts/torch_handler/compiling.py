"""torch.compile as the `pt2` key of the model's YAML asks for it."""

from __future__ import annotations

import contextlib
import importlib
import logging
from typing import TYPE_CHECKING, Any

import torch

from ..utils.util import check_valid_pt2_backend

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

# Backends that a package adds to torch when it is imported.
_PACKAGES = {"openvino": "openvino.torch", "tensorrt": "torch_tensorrt", "hpu_backend": "habana_frameworks.torch"}


def is_compiled_ahead(config: Mapping[str, Any]) -> bool:
    """Whether `pt2: {export: {aot_compile: true}}` says that the serialized file is a compiled library."""
    pt2 = config.get("pt2")
    export = pt2.get("export") if isinstance(pt2, dict) else None
    return isinstance(export, dict) and export.get("aot_compile") is True


def compile_options(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments for torch.compile; None where the model is to stay as it is.

    `pt2: {compile: {enable: true, backend: inductor, …}}`, or in the older way `pt2: inductor` and `pt2: {backend: …}`.

    Raises:
        ValueError: `pt2` is something else.
    """
    pt2 = config.get("pt2")
    if pt2 is None:
        return None
    options: dict[str, Any]
    if isinstance(pt2, str):
        options = {"backend": pt2}
    elif not isinstance(pt2, dict):
        raise ValueError(f"pt2 should be str or dict, it is {pt2!r}")
    elif "compile" in pt2:
        if not isinstance(pt2["compile"], dict):
            raise ValueError(f"pt2.compile should be a dict with enable: true, it is {pt2['compile']!r}")
        options = dict(pt2["compile"])
        if options.pop("enable", None) is not True:
            return None
    elif "export" in pt2:
        return None
    else:
        options = dict(pt2)
    if isinstance(pt2, str) or "compile" not in pt2:
        logger.warning("pt2: %s is the older way to ask for torch.compile: pt2: {compile: {enable: true, …}}", pt2)
    return options if "backend" not in options or check_valid_pt2_backend(options["backend"]) else None


def compile_model(model: Any, options: Mapping[str, Any]) -> Any:
    """The compiled model, or the model itself where torch refuses; either way the log says so, with the backend.

    torch compiles with the first batch: until then this costs nothing, and what goes wrong there fails that batch.
    """
    shown = {"backend": "inductor"} | dict(options) if "backend" not in options else options
    text = ", ".join(f"{key} {value}" for key, value in shown.items())
    package = _PACKAGES.get(str(options.get("backend")))
    if package is not None:
        with contextlib.suppress(ImportError):  # torch then says that there is no such backend
            importlib.import_module(package)
    try:
        compiled = torch.compile(model, **options)
    except Exception as error:
        logger.warning("Compiling model with %s has failed; proceeding without compilation: %s", text, error)
        return model
    logger.info("Compiled model with %s", text)
    return compiled
