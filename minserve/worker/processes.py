"""Processes by pidfd: when one ends, how it ended, and how to be rid of it and of everything it started."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import signal
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_GET_INFO, _INFO_BYTES, _INFO_EXIT = 0xC040FF0B, 64, 8  # PIDFD_GET_INFO, PIDFD_INFO_SIZE_VER0, PIDFD_INFO_EXIT
PR_SET_PDEATHSIG = 1  # prctl(2)
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: between fork and exec nothing may be imported
STOPPED = frozenset("Tt")  # by a signal, or by a debugger: proc(5)
IN_THE_KERNEL = "D"
ENDED = frozenset("ZX")  # states of a process that has not been reaped yet: proc(5)


def die_with(parent: int) -> None:
    """Ties a new process to its parent: the kernel kills it when that dies. For between fork and exec.

    The kernel ties it to the thread that forked, so that thread must live as long as the parent.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


class Watch:
    """Tells the end of a process, also of one that is not our child.

    Args:
        on_exit: called once, with the exit code as `subprocess` gives it, None when nobody could read it.
    """

    def __init__(self, pid: int, on_exit: Callable[[int | None], None]) -> None:
        self.pid = pid
        self.ended = asyncio.Event()
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._fd = -1
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._loop.call_soon(self._end, None)
        else:
            self._loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Stops watching."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _readable(self) -> None:
        code = exit_code(self.pid)
        if code is None:
            code = reaped_exit_code(self._fd)
        self.close()
        self._end(code)

    def _end(self, code: int | None) -> None:
        self.ended.set()
        self._on_exit(code)


def exit_code(pid: int) -> int | None:
    """How a process ended that its parent has not reaped yet; None when it is too late.

    Field 52 of /proc/<pid>/stat (proc(5)) is the status as `waitpid` gives it.
    """
    fields = _stat(pid)
    try:
        return os.waitstatus_to_exitcode(int(fields[49])) if fields[0] in ENDED else None
    except (IndexError, ValueError):
        return None


def reaped_exit_code(pidfd: int) -> int | None:
    """How a process ended that its parent has reaped already, as torchrun does within 0.1 s; None on a Linux before 6.15.

    `struct pidfd_info` (linux/pidfd.h): 8 bytes of flags, which ask and say what is there, and at 60 the status.
    """
    info = bytearray(_INFO_BYTES)
    struct.pack_into("=Q", info, 0, _INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _GET_INFO, info)
    except OSError:
        return None
    (known,), (status,) = struct.unpack_from("=Q", info), struct.unpack_from("=i", info, _INFO_BYTES - 4)
    return os.waitstatus_to_exitcode(status) if known & _INFO_EXIT else None


def has_ended(pid: int) -> bool:
    """Whether a process has ended and only waits to be reaped."""
    return process_state(pid) in ENDED


def process_state(pid: int) -> str:
    """A process's state, one letter as in proc(5); "" when there is none."""
    return "".join(_stat(pid)[:1])


def _stat(pid: int) -> list[str]:
    """/proc/<pid>/stat from field 3, the state, on; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name in field 2 may hold anything


def kill_tree(agent: int, ranks: Iterable[int]) -> None:
    """SIGKILLs each rank's process group, then the agent's.

    torchrun makes every rank the leader of its own session, so a rank's helpers (compilers, data workers) are in its group.
    Ranks that have not said HELLO yet are found as the agent's children.
    """
    groups = set(ranks)
    with contextlib.suppress(psutil.Error):
        groups |= {child.pid for child in psutil.Process(agent).children(recursive=True)}
    for pid in [*groups, agent]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def kill_leftovers(incarnation: str) -> list[int]:
    """SIGKILLs what a rank group has left behind.

    That is every process below this one with the group's incarnation in its environment (worker/launcher.py puts it there),
    and all that it has started. Call it once the agent and the ranks have ended: a helper in a session of its own is our
    child then, for this process adopts orphans (worker/reaper.py).

    Returns:
        The pids.
    """
    mark = f"MINSERVE_WORKER={incarnation}".encode()
    killed: set[int] = set()
    while fresh := set(_carriers(mark)) - killed:  # once more after each kill: one may have forked meanwhile
        for pid in fresh:  # of our own children, which keep their pids until we reap them, and of their trees
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed |= fresh
    return sorted(killed)


def _carriers(mark: bytes) -> Iterator[int]:
    """Our children whose environment holds the mark, and everything below them, whatever its environment holds."""
    for child in children(os.getpid()):
        if mark in _environment(child):
            pids = [child]
            for pid in pids:
                yield pid
                pids += children(pid)


def _environment(pid: int) -> list[bytes]:
    """As the process was given it; empty for one that has ended, or is somebody else's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def children(pid: int) -> list[int]:
    """The children of a process, those that have ended and are not reaped yet included.

    Not psutil's: that reads the state of every process of the machine.
    """
    pids: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # a thread may end meanwhile
                pids += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_bytes().split())
    return pids


def oom_kills(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How many processes of this server's control group the kernel has killed for want of memory; None if it does not tell.

    Ranks are in the server's group. cgroup v2 counts in `memory.events`, v1 in `memory.oom_control`. The root group of v2
    has no count. In a container the path may be the host's, while only the container's part is mounted.
    """
    try:
        memberships = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, path in memberships:
        if "memory" in controllers.split(","):
            mount, name = cgroups / "memory", "memory.oom_control"
        elif not controllers:
            mount, name = cgroups, "memory.events"
        else:
            continue
        for directory in (mount / path.lstrip("/"), mount):
            with contextlib.suppress(OSError):
                counts = dict(line.split() for line in (directory / name).read_text().splitlines())
                if "oom_kill" in counts:
                    return int(counts["oom_kill"])
    return None
