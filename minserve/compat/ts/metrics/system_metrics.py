"""Metrics of the machine, for scripts of `system_metrics_cmd` that build upon TorchServe's.

Each function adds its metrics to `system_metrics`; `collect_all` calls all of a module's and logs what there is then.
"""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING

import psutil

from minserve.rank.metrics import Dimension

from .metric import Metric

if TYPE_CHECKING:
    from types import ModuleType

system_metrics: list[Metric] = []
dimension = [Dimension("Level", "Host")]

_MIB = 1024**2
_GIB = 1024**3


def cpu_utilization() -> None:
    """The share of the processors' time that is used, in percent."""
    system_metrics.append(Metric("CPUUtilization", psutil.cpu_percent(), "percent", dimension))


def memory_used() -> None:
    """Used memory in megabytes."""
    system_metrics.append(Metric("MemoryUsed", psutil.virtual_memory().used / _MIB, "MB", dimension))


def memory_available() -> None:
    """Available memory in megabytes."""
    system_metrics.append(Metric("MemoryAvailable", psutil.virtual_memory().available / _MIB, "MB", dimension))


def memory_utilization() -> None:
    """Used memory in percent."""
    system_metrics.append(Metric("MemoryUtilization", psutil.virtual_memory().percent, "percent", dimension))


def disk_used() -> None:
    """Used space of the root file system in gigabytes."""
    system_metrics.append(Metric("DiskUsage", psutil.disk_usage("/").used / _GIB, "GB", dimension))


def disk_utilization() -> None:
    """Used space of the root file system in percent."""
    system_metrics.append(Metric("DiskUtilization", psutil.disk_usage("/").percent, "percent", dimension))


def disk_available() -> None:
    """Free space of the root file system in gigabytes."""
    system_metrics.append(Metric("DiskAvailable", psutil.disk_usage("/").free / _GIB, "GB", dimension))


def gpu_utilization(num_of_gpu: int) -> None:
    """Memory and work of each GPU; nothing when there is none."""
    if num_of_gpu <= 0:
        return
    import pynvml

    pynvml.nvmlInit()
    try:
        for index in range(min(num_of_gpu, pynvml.nvmlDeviceGetCount())):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            labels = [*dimension, Dimension("DeviceId", index)]
            used = 100 * memory.used / memory.total
            busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            system_metrics.append(Metric("GPUMemoryUtilization", used, "percent", labels))
            system_metrics.append(Metric("GPUMemoryUsed", memory.used / _MIB, "MB", labels))
            system_metrics.append(Metric("GPUUtilization", busy, "percent", labels))
    finally:
        pynvml.nvmlShutdown()


def collect_all(mod: ModuleType, num_of_gpu: int) -> None:
    """Calls every function of a module but this one, and logs a line for each metric that there is then."""
    for name, function in inspect.getmembers(mod, inspect.isfunction):
        if name == "gpu_utilization":
            function(num_of_gpu)
        elif name != "collect_all":
            function()
    for metric in system_metrics:
        logging.info(str(metric))
    logging.info("")
