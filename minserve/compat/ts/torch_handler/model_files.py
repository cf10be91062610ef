"""From the files of an archive to a model on its device."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import psutil
import torch

from minserve.rank.loading import import_file

from ..utils.util import list_classes_from_module

logger = logging.getLogger(__name__)


def choose_device(gpu_id: int | str | None) -> tuple[str | None, torch.device]:
    """Where the model of this rank goes.

    Args:
        gpu_id: the rank's GPU among those that it sees; None: it has none.

    Returns:
        The kind of device (cuda, xpu, mps, cpu; None for XLA) and the device.
    """
    if gpu_id is not None:
        for kind, backend in (("cuda", torch.cuda), ("xpu", torch.xpu)):
            if backend.is_available():
                return kind, torch.device(f"{kind}:{gpu_id}")
        if torch.backends.mps.is_available():
            return "mps", torch.device("mps")
    if importlib.util.find_spec("torch_xla") is not None:
        return None, importlib.import_module("torch_xla.core.xla_model").xla_device()
    return "cpu", torch.device("cpu")


def load_eager(model_dir: str, model_file: str, weights: str | None, device: torch.device | None) -> Any:
    """Makes an object of the one class in the model file and gives it its weights.

    Args:
        model_file: a Python file in `model_dir`.
        weights: a state dict that torch.save has written; None: the model goes without.

    Raises:
        RuntimeError: there is no such model file.
        ValueError: it defines no class, or several.
    """
    path = os.path.join(model_dir, model_file)
    if not os.path.isfile(path):
        raise RuntimeError(f"Missing the {model_file} file, which the manifest names as modelFile: {path}")
    classes = list_classes_from_module(import_file(Path(path), "model"))
    if len(classes) != 1:
        found = ", ".join(kind.__name__ for kind in classes) or "none"
        raise ValueError(f"Expected only one class as model definition in {model_file}, found {found}")
    model = classes[0]()
    if weights:
        model.load_state_dict(load_saved(weights, device))
    return model


def load_saved(path: str, device: torch.device | str | None = None) -> Any:
    """What torch.save has written into a file of the archive.

    First as plain weights, then with all the classes that the file asks for: the archive has code of its own to run anyway.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        logger.info("%s is more than weights (%s); loading it with its classes", path, str(error).partition("\n")[0])
        return torch.load(path, map_location=device, weights_only=False)


def load_torchscript(path: str, device: torch.device) -> Any:
    """A TorchScript model.

    Raises:
        RuntimeError: torch cannot read it.
    """
    try:
        return torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call, unused-ignore]
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise RuntimeError(
            f"{path} is not TorchScript: {str(error).partition(chr(10))[0]}\n"
            "For a state dict name the file with the model's class as modelFile."
        ) from error


def load_onnx(path: str, device: torch.device | None) -> Any:
    """An onnxruntime session, on this rank's GPU where it has one.

    Raises:
        ModuleNotFoundError: there is no onnxruntime.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise ModuleNotFoundError(
            f"{os.path.basename(path)} needs the package onnxruntime: add it to the model's requirements.txt",
            name="onnxruntime",
        )
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = psutil.cpu_count(logical=True)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device is not None and device.type == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    return onnxruntime.InferenceSession(path, sess_options=options, providers=providers)


def load_aot(path: str, device: torch.device) -> Any:
    """A function that AOTInductor has compiled into a shared library."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return torch._export.aot_load(path, device.type)  # type: ignore[no-untyped-call, unused-ignore]
