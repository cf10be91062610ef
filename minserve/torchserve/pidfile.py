"""The file by which `--stop` and a second `--start` find the server that runs."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import psutil

PID_FILE = ".model_server.pid"


def pid_file() -> Path:
    """Where the running server's pid stands: one server for each temp folder, as with TorchServe."""
    return Path(tempfile.gettempdir()) / PID_FILE


def running_pid() -> int | None:
    """The pid of the server that runs; None if there is none, whatever an old file says."""
    try:
        pid = int(pid_file().read_text())
        command = " ".join(psutil.Process(pid).cmdline())
    except (OSError, ValueError, psutil.Error):
        return None
    ours = "minserve" in command and "torchserve" in command
    return pid if ours or "org.pytorch.serve" in command else None


def claim() -> None:
    """Writes this process's pid.

    Raises:
        OSError: somebody else's file, or a link, is in the way: the temp folder may be everybody's.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(pid_file(), flags, 0o644), "w") as file:
        file.write(str(os.getpid()))


def release() -> None:
    """Removes the file if it is this process's."""
    with contextlib.suppress(OSError, ValueError):
        if int(pid_file().read_text()) == os.getpid():
            pid_file().unlink()
