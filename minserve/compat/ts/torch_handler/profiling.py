"""A batch under torch's profiler: where ENABLE_TORCH_PROFILER is set, or where a handler asks for it."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from torch.profiler import profile, record_function, supported_activities, tensorboard_trace_handler

if TYPE_CHECKING:
    from .base_handler import BaseHandler

TRACES = "/tmp/pytorch_profiler"  # where TorchServe's users look for them

logger = logging.getLogger(__name__)


def run_profiled(handler: BaseHandler, data: Any) -> tuple[Any, profile]:
    """Takes a batch through the handler's steps, each under its name in the trace.

    `handler.profiler_args` are arguments for `torch.profiler.profile`; those that miss are filled in.

    Returns:
        The answers, and the profiler, whose table is in the log.
    """
    arguments = handler.profiler_args
    if not arguments:
        arguments["activities"] = list(supported_activities())  # type: ignore[no-untyped-call, unused-ignore]
        arguments["record_shapes"] = True
    if "on_trace_ready" not in arguments:
        folder = os.path.join(TRACES, ((handler.manifest or {}).get("model") or {}).get("modelName", ""))
        arguments["on_trace_ready"] = tensorboard_trace_handler(folder)
        logger.info("Saving chrome trace to : %s", folder)
    with profile(**arguments) as profiler:
        with record_function("preprocess"):
            inputs = handler.preprocess(data)
        if handler._is_explain():
            with record_function("explain"):
                output = handler.explain_handle(inputs, data)
        else:
            with record_function("inference"):
                output = handler.inference(inputs)
            with record_function("postprocess"):
                output = handler.postprocess(output)
    logger.info(profiler.key_averages().table(sort_by="cpu_time_total", row_limit=10))
    return output, profiler
