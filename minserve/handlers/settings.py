"""What torch keeps for each thread by itself. A handler sets it once, in `load`, and its batches run on other threads."""

from __future__ import annotations

from collections.abc import Callable

import torch


def take_down_settings() -> Callable[[], None]:
    """Takes down the settings of this thread, and returns what makes them those of the thread that calls it."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    home = torch.get_default_device()
    # Asked for only where CUDA is in use: the question alone would start it.
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def settle_in() -> None:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        if home != torch.get_default_device():
            torch.set_default_device(home)
        if inference:
            torch.inference_mode().__enter__()  # for the life of the thread
        torch.set_grad_enabled(grad)

    return settle_in
