"""How much memory processes take."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from typing import TextIO


def get_cpu_usage(pid: int | str) -> int:
    """The resident memory of a process in bytes, 0 when there is no such process."""
    try:
        return int(psutil.Process(int(pid)).memory_info().rss)
    except psutil.Error as error:
        logging.error("no memory usage of pid %s: %s", pid, error)
        return 0


def check_process_mem_usage(stdin: TextIO) -> None:
    """Logs a line `pid:bytes` for each process id of a comma-separated list."""
    for pid in stdin.read().split(","):
        logging.info("%s:%d", pid.strip(), get_cpu_usage(pid.strip()))
