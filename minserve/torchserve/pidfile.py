"""The file by which `--stop` and a second `--start` find the server that runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import psutil

from minserve.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterator

PID_FILE = ".model_server.pid"
_LONGEST_PID = 20  # bytes
# A lock of the whole file by its open description, see fcntl(2): that it is held can be seen without taking it.
_LOCK = struct.pack("hhqqii", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0, 0)


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
            if _is_locked(file.fileno()):
                return pid
        command = " ".join(psutil.Process(pid).cmdline())  # of a TorchServe
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    return pid if "org.pytorch.serve" in command else None


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
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, _LOCK)
            if os.fstat(file.fileno()).st_nlink:  # else a server that ended has removed it before the lock was had
                undo.pop_all()
                return file


def _is_locked(descriptor: int) -> bool:
    (kind,) = struct.unpack_from("h", fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _LOCK))
    return bool(kind != fcntl.F_UNLCK)
