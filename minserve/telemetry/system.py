"""The machine's load as metrics: CPU, memory, disk and GPUs, once soon after the start and then at an interval.

Without a subprocess, unlike TorchServe: a process for each look costs more than all it measures. Only a `system_metrics_cmd`
is run as one, and its lines are read as TorchServe reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pynvml

from minserve.telemetry import declarations as declared
from minserve.telemetry.metrics import HOST

if TYPE_CHECKING:
    from collections.abc import Mapping

    from minserve.telemetry.metrics import Metrics

MIB, GIB = 2**20, 2**30
FIRST_LOOK_S = 0.1  # over which the first CPU load is measured; later ones are since the look before
COMMAND_TIMEOUT_S = 30.0
MOST_OUTPUT = 2**20

_LINE = re.compile(
    r"\s*(?P<name>[\w\s]+)\.(?P<unit>[\w\s]+):(?P<value>[0-9\-,.e]+)\|#(?P<labels>[^|]*)"
    r"(\|#type:[^|,]+)?\|#hostname:(?P<hostname>[^,]+),.+"
)
Value = tuple[str, float, tuple[str, ...]]
"""Name, value, and the labels' values but the host's name."""

logger = logging.getLogger(__name__)


class SystemMetrics:
    """Looks at the machine until it is stopped.

    Args:
        interval: seconds between two looks.
        command: arguments of Python, as TorchServe has them, that print the metrics instead; "" for our own look.
        gpus: whether GPUs are looked at, too.
        environ: of the command.
    """

    def __init__(self, metrics: Metrics, interval: float, command: str, gpus: bool, environ: Mapping[str, str]) -> None:
        self._metrics = metrics
        self._interval = interval
        self._command = command.split()
        self._gpus = gpus
        self._environ = environ
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins with the first look."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """No look comes any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        over = FIRST_LOOK_S
        while True:
            try:
                await self._look(over)
            except Exception as error:  # a file system that hangs, a driver that goes: the next look may do
                logger.warning("system metrics: %s: %s", type(error).__name__, error)
            over = 0.0
            await asyncio.sleep(self._interval)

    async def _look(self, over: float) -> None:
        if self._command:
            for line in await self._ask():
                found = parse(line)
                if found is None:
                    logger.warning("system_metrics_cmd: not a metric: %.200r", line)
                else:
                    value, hostname = found
                    self._metrics.system(*value, hostname)
            return
        for name, number, labels in await asyncio.to_thread(look, over, self._gpus):
            self._metrics.system(name, number, labels)

    async def _ask(self) -> list[str]:
        """The lines that the command prints, up to the first empty one."""
        process = self._spawn()
        try:
            output, errors = await asyncio.to_thread(process.communicate, timeout=COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"system_metrics_cmd took longer than {COMMAND_TIMEOUT_S:g} s") from None
        finally:
            process.kill()  # and so the thread ends, too, where the server does
        if errors.strip():
            logger.warning("system_metrics_cmd: %s", errors.decode(errors="replace").strip()[-1000:])
        lines = output[:MOST_OUTPUT].decode(errors="replace").splitlines()
        return lines[: lines.index("")] if "" in lines else lines

    def _spawn(self) -> subprocess.Popen[bytes]:
        """Not by asyncio: uvloop takes SIGCHLD for that, which is the reaper's."""
        return subprocess.Popen(
            [sys.executable, *self._command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environ,
        )


def look(over: float = 0.0, gpus: bool = True) -> list[Value]:
    """One look at the machine.

    Args:
        over: seconds over which the CPU's load is measured; 0: since the last look.
    """
    memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
    values: list[tuple[declared.Declaration, float]] = [
        (declared.CPU, psutil.cpu_percent(over or None)),
        (declared.MEMORY_USED, memory.used / MIB),
        (declared.MEMORY_AVAILABLE, memory.available / MIB),
        (declared.MEMORY, memory.percent),
        (declared.DISK_USED, disk.used / GIB),
        (declared.DISK, disk.percent),
        (declared.DISK_AVAILABLE, disk.free / GIB),
    ]
    host: list[Value] = [(declaration.name, value, (HOST,)) for declaration, value in values]
    return host + (_gpus() if gpus else [])


def _gpus() -> list[Value]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver: no GPU
        return []
    try:
        return [value for index in range(pynvml.nvmlDeviceGetCount()) for value in _gpu(index)]
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> list[Value]:
    """What the driver tells of a GPU. One in MIG mode has no load as a whole."""
    values: list[Value] = []
    labels = (HOST, str(index))
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    with contextlib.suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        values.append((declared.GPU_MEMORY.name, 100 * memory.used / memory.total, labels))
        values.append((declared.GPU_MEMORY_USED.name, memory.used / MIB, labels))
    with contextlib.suppress(pynvml.NVMLError):
        values.append((declared.GPU.name, pynvml.nvmlDeviceGetUtilizationRates(handle).gpu, labels))
    return values


def parse(line: str) -> tuple[Value, str] | None:
    """A line of TorchServe's form, `Name.Unit:value|#Label:value,...|#hostname:H,T`: the value and the host's name."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    try:
        number = float(match["value"])
    except ValueError:
        return None
    labels = tuple(pair.partition(":")[2] for pair in match["labels"].split(",") if pair)
    return (match["name"].strip(), number, labels), match["hostname"]
