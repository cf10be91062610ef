"""The file by which `--stop` and a second `--start` find the server that runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import psutil

from minserve.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterator

PID_FILE = ".model_server.pid"
_LONGEST_PID = 20  # bytes


def pid_file() -> Path:
    """Where the running server's pid stands: one server for each temp folder, as with TorchServe."""
    return Path(tempfile.gettempdir()) / PID_FILE


def running_pid() -> int | None:
    """The pid of the server that runs; None if there is none, whatever an old file says."""
    try:
        # Not waited for, and not read to its end: the temp folder may be everybody's, and the file a pipe.
        descriptor = os.open(pid_file(), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            pid = int(file.read(_LONGEST_PID))
        command = " ".join(psutil.Process(pid).cmdline())
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    ours = "minserve" in command and "torchserve" in command
    return pid if ours or "org.pytorch.serve" in command else None


@contextlib.contextmanager
def claimed() -> Iterator[None]:
    """This process's pid stands in the file meanwhile.

    A lock tells it from what an earlier server has left: of two that start at once only one gets it.

    Raises:
        StartupError: a server that lives has it; or somebody else's file, or what is no file, is in the way.
    """
    path = pid_file()
    try:
        file = _locked(path)
    except BlockingIOError:
        raise StartupError("TorchServe is already running, please use torchserve --stop to stop TorchServe.") from None
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror}; TMPDIR chooses another folder") from None
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _locked(path: Path) -> TextIO:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.ExitStack() as undo:
            file = undo.enter_context(open(os.open(path, flags, 0o644), "w"))
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(0, "there is a file of that name, and it is no regular one")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:  # else a server that ended has removed it before the lock was had
                undo.pop_all()
                return file
